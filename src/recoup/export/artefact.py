"""What a folder says of itself, so that it can be verified later: artefact.json, and artefact.safetensors.

The JSON has the format of the folder, the scheme and the digests of every quantized module, and the sums of
all files; the tensors are a batch, what the trained model answered to it, biases, and the scales of inputs
and outputs.
What is read is not trusted: it is checked as a recipe is, and no name in it leads out of the folder.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, cast

import numpy as np
from pydantic import TypeAdapter, ValidationError, with_config
from safetensors.torch import save_file
from torch import Tensor

from recoup.export.answers import Answers
from recoup.export.rebuilt import DTYPES, KINDS, Convolution, canonical
from recoup.export.trained import Layer, Stored, Trained, layer_of, tensors_of
from recoup.nn import Batch, CodedModule, FakeQuantizer
from recoup.numerics import QuantSpec
from recoup.schemes import Scheme

FILE, TENSORS, FORMAT = "artefact.json", "artefact.safetensors", 1
_LARGEST = 2**26  # of artefact.json
Scalar = bool | int | float | str | None


@with_config(extra="forbid")
@dataclass(frozen=True, kw_only=True)
class Module:
    """A quantized module.

    Args:
        kind: a key of `KINDS`.
        scheme: its name.
        shape: of the codes.
        dtype: that the weight is decoded to.
        places: every name of the module, the first one included.
        digests: SHA-256 of every tensor on a lattice; see `digest`.
        convolution: for one that is.
    """

    kind: str
    scheme: str
    shape: tuple[int, int]
    dtype: Literal["float32", "bfloat16", "float16"]
    places: tuple[str, ...]
    digests: dict[str, str]
    convolution: Convolution | None = None


@with_config(extra="forbid")
@dataclass(frozen=True, kw_only=True)
class Example:
    """The batch that was asked, and what the answers may differ by.

    Args:
        batch: whether it is a mapping, a sequence, or one tensor; the tensors are in artefact.safetensors.
        others: its values that are no tensors, by name or place.
        answers: the names of the outputs, in their order.
        every, allowed, allowed_nats, allowed_flip: see `Answers`.
    """

    batch: Literal["mapping", "sequence", "tensor"]
    others: dict[str, Scalar]
    answers: tuple[str, ...]
    every: int
    allowed: float
    allowed_nats: float | None
    allowed_flip: float | None = None


@with_config(extra="forbid")
@dataclass(frozen=True, kw_only=True)
class File:
    """A file of the folder."""

    bytes: int
    sha256: str


@with_config(extra="forbid")
@dataclass(frozen=True, kw_only=True)
class Artefact:
    """artefact.json.

    Args:
        format: of the folder, `FORMAT` after migration.
        recoup: the version that wrote it; None where nobody noted it.
        target: a key of `TARGETS`.
        schemes: by name.
        modules: what is quantized, by name; None where nobody noted it.
        outputs: the spec of every output that is quantized, by the module that makes it.
        example: None where the batch could not be recorded, or nobody did.
        files: all others, by their path in the folder; None where nobody noted them.
    """

    format: int
    recoup: str | None
    target: str
    schemes: dict[str, Scheme] = field(default_factory=dict)
    modules: dict[str, Module] | None = None
    outputs: dict[str, QuantSpec] = field(default_factory=dict)
    example: Example | None = None
    files: dict[str, File] | None = None

    def layers(self) -> dict[str, Layer]:
        """The modules as readers of bytes need them.

        Raises:
            ValueError: one is of no known kind or scheme.
        """
        found: dict[str, Layer] = {}
        for path, module in (self.modules or {}).items():
            for what, value, known in (("kind", module.kind, KINDS), ("scheme", module.scheme, self.schemes)):
                if value not in known:
                    there = ", ".join(known) or "none"
                    raise ValueError(f"{FILE}: modules.{path}: no {what} {value!r}; there are {there}")
            found[path] = Layer(
                scheme=self.schemes[module.scheme],
                kind=KINDS[module.kind],
                shape=module.shape,
                places=module.places,
            )
        return found


def write(folder: Path, target: str, trained: Trained) -> None:
    """Record what was trained, beside the files that were written from it."""
    tensors, example = _recorded(trained)
    for path, module in trained.modules.items():
        if (bias := getattr(module, "bias", None)) is not None:
            tensors[f"bias.{path}"] = bias
        quantizer = getattr(module, "input_quantizer", None)
        if isinstance(quantizer, FakeQuantizer):
            tensors |= {f"input.{name}.{path}": value for name, value in quantizer.state_dict().items()}
    for path, quantizer in trained.outputs.items():
        tensors |= {f"output.{name}.{path}": value for name, value in quantizer.state_dict().items()}
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    save_file(copies, folder / TENSORS)
    found = Artefact(
        format=FORMAT,
        recoup=version("recoup"),
        target=target,
        schemes={module.scheme.name: module.scheme for module in trained.modules.values()},
        modules={path: _module(module, trained, path) for path, module in trained.modules.items()},
        outputs={path: quantizer.spec for path, quantizer in trained.outputs.items()},
        example=example,
        files={name: sum_of(folder / name) for name in names_of_files(folder)},
    )
    (folder / FILE).write_text(json.dumps(_ADAPTER.dump_python(found, mode="json"), indent=2) + "\n")


def parse(file: Path, data: Any) -> Artefact:
    """An artefact from data of this format.

    Raises:
        ValueError: it is none; one line.
    """
    try:
        return _ADAPTER.validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "as a whole"
        raise ValueError(f"{file}: {place}: {' '.join(first['msg'].split())}; export it again") from None


def read_json(file: Path) -> dict[str, Any]:
    """Plain data of artefact.json, of any format.

    Raises:
        ValueError: it is no JSON, or no object.
    """
    if file.stat().st_size > _LARGEST:
        raise ValueError(f"{file}: {file.stat().st_size} bytes, more than {_LARGEST}; export it again")
    try:
        data = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file}: no whole JSON ({reason}); export it again") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file}: expected keys and values, found {type(data).__name__}; export it again")
    return cast(dict[str, Any], data)


def example_of(artefact: Artefact, tensors: Mapping[str, Tensor]) -> tuple[Batch, Answers]:
    """The batch and the answers that were recorded.

    Raises:
        ValueError: tensors are missing.
    """
    found = artefact.example
    assert found is not None
    values: dict[str, Any] = dict(found.others)
    values |= _with_prefix(tensors, "example.")
    answered = _with_prefix(tensors, "answer.")
    places = [str(place) for place in range(len(values))]
    named = found.batch == "mapping" or set(values) == set(places if found.batch == "sequence" else ["0"])
    if set(answered) != set(found.answers) or not named or found.every < 1 or not values:
        raise ValueError(f"{TENSORS}: not the batch and the answers of {FILE}; export it again")
    batch: Batch = values
    if found.batch != "mapping":
        batch = tuple(values[place] for place in places) if found.batch == "sequence" else values["0"]
    return batch, Answers(
        values={name: answered[name] for name in found.answers},
        allowed=found.allowed,
        allowed_nats=found.allowed_nats,
        allowed_flip=found.allowed_flip,
        every=found.every,
    )


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


def inside(folder: Path, name: str) -> Path:
    """A file of the folder by the name that artefact.json has for it.

    Raises:
        ValueError: the name leads out of it.
    """
    paths = PurePosixPath(name), PureWindowsPath(name)
    file = folder / name
    if (
        not name
        or any(path.is_absolute() or path.drive or ".." in path.parts for path in paths)
        or not file.resolve().is_relative_to(folder.resolve())
    ):
        raise ValueError(f"{folder / FILE}: files: {name!r} is no file of its folder; export it again")
    return file


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
    """The batch and the answers; nothing of a batch with values that JSON does not have."""
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
    return tensors, Example(
        batch=kind,
        others=others,
        answers=tuple(answers.values),
        every=answers.every,
        allowed=answers.allowed,
        allowed_nats=answers.allowed_nats,
        allowed_flip=answers.allowed_flip,
    )


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


_ADAPTER = TypeAdapter(Artefact)
