"""What export records of a model, so that a folder can be verified without it: see `artefact.py`."""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from recoup.export.artefact import (
    FILE,
    FORMAT,
    GENERATED,
    ROUTING,
    TENSORS,
    Artefact,
    Cache,
    Example,
    File,
    Module,
    to_json,
)
from recoup.export.rebuilt import DTYPES, Convolution, canonical
from recoup.export.trained import Stored, Trained, layer_of, tensors_of
from recoup.nn import CodedModule, FakeQuantizer
from recoup.numerics import QuantSpec


def write(folder: Path, target: str, trained: Trained) -> None:
    """Record what was trained, beside the files that were written from it."""
    tensors, example = _recorded(trained)
    for path, module in trained.modules.items():
        if (bias := getattr(module, "bias", None)) is not None:
            tensors[f"bias.{path}"] = bias
        quantizer = getattr(module, "input_quantizer", None)
        if isinstance(quantizer, FakeQuantizer):
            tensors |= _state("input", path, quantizer)
    for path, quantizer in trained.lattices.items():
        tensors |= _state("lattice", path, quantizer)
    for path, quantizer in trained.cached.items():
        tensors |= _state("cache", path, quantizer)
    tensors |= {f"{ROUTING}{name}": choice for name, choice in trained.routing.items()}
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    save_file(copies, folder / TENSORS)
    found = Artefact(
        format=FORMAT,
        recoup=version("recoup"),
        target=target,
        schemes={module.scheme.name: module.scheme for module in trained.modules.values()},
        modules={path: _module(module, trained, path) for path, module in trained.modules.items()},
        lattices={path: quantizer.spec for path, quantizer in trained.lattices.items()},
        example=example,
        cache=_cache(trained),
        files={name: sum_of(folder / name) for name in names_of_files(folder)},
    )
    (folder / FILE).write_text(json.dumps(to_json(found), indent=2) + "\n")


def digest(name: str, tensor: Tensor) -> str:
    """SHA-256 of a tensor: its name, type and shape, then its bytes in rows, little-endian."""
    head = f"{name} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}\n".encode()
    found = hashlib.sha256(head)
    found.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).data)
    return found.hexdigest()


def digests(stored: Stored, spec: QuantSpec) -> dict[str, str]:
    """Of everything that was read back of a module."""
    return {name: digest(name, canonical(name, array, spec)) for name, array in stored.items()}


def names_of_files(folder: Path) -> list[str]:
    """Every file of the artefact, as a path in the folder; without artefact.json and parity.json."""
    found = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
    return [name for name in found if name not in (FILE, "parity.json")]


def sum_of(file: Path) -> File:
    """Size and SHA-256."""
    with file.open("rb") as opened:
        return File(bytes=file.stat().st_size, sha256=hashlib.file_digest(opened, "sha256").hexdigest())


def _state(kind: str, path: str, quantizer: FakeQuantizer) -> dict[str, Tensor]:
    return {f"{kind}.{name}.{path}": value for name, value in quantizer.state_dict().items()}


def _cache(trained: Trained) -> Cache | None:
    quantizers = trained.cached
    if not quantizers:
        return None
    first, *others = (quantizer.spec for quantizer in quantizers.values())
    assert all(other == first for other in others), "a recipe has one spec of keys and values"
    return Cache(spec=first, names=tuple(quantizers))


def _module(module: CodedModule, trained: Trained, path: str) -> Module:
    layer = layer_of(module, tuple(place for place, first in trained.places.items() if first == path))
    return Module(
        kind=layer.kind.__name__.removeprefix("Coded"),
        scheme=module.scheme.name,
        shape=layer.shape,
        dtype=next(name for name, dtype in DTYPES.items() if dtype == module.weight.dtype),  # pyright: ignore[reportArgumentType]
        places=layer.places,
        digests={name: digest(name, tensor) for name, tensor in tensors_of(module).items()},
        convolution=Convolution.of(module),
    )


def _recorded(trained: Trained) -> tuple[dict[str, Tensor], Example | None]:
    """The batch, answers and words generated; nothing of a batch with values that JSON does not have."""
    batch = trained.example
    kind: Literal["mapping", "sequence", "tensor"] = "mapping"
    if isinstance(batch, Mapping):
        values: dict[str, Any] = dict(batch)
    else:
        kind = "tensor" if isinstance(batch, Tensor) else "sequence"
        parts = (batch,) if isinstance(batch, Tensor) else batch
        values = {str(place): value for place, value in enumerate(parts)}
    tensors = {f"example.{name}": value for name, value in values.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
    if not all(isinstance(value, (bool, int, float, str, type(None))) for value in others.values()):
        return {}, None
    answers = trained.recorded
    tensors |= {f"answer.{name}": value for name, value in answers.values.items()}
    if (said := trained.generation) is not None:
        tensors |= {f"generation.{name}": getattr(said, name) for name in GENERATED}
    return tensors, Example(
        batch=kind,
        others=others,
        answers=tuple(answers.values),
        every=answers.every,
        allowed=answers.allowed,
        allowed_nats=answers.allowed_nats,
        allowed_flip=answers.allowed_flip,
        allowed_decoding=None if said is None else said.allowed,
    )
