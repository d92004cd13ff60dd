"""What a folder says of itself, so that it can be verified later: artefact.json, and artefact.tensors.

The JSON has the format of the folder, the scheme and the digests of every quantized module, and the sums of
all files; the tensors are a batch, what the trained model answered to it and generated after it, biases, and
the scales of inputs, outputs, keys and values.
What is read is not trusted: it is checked as a recipe is, and no name in it leads out of the folder.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, cast

import torch
from pydantic import TypeAdapter, ValidationError, with_config
from torch import Tensor

from recoup.export.answers import Answers
from recoup.export.onnx_decoding import Generation
from recoup.export.rebuilt import KINDS, Convolution
from recoup.export.trained import Layer
from recoup.nn import Batch
from recoup.numerics import QuantSpec
from recoup.schemes import Scheme

FILE, FORMAT = "artefact.json", 1
TENSORS = "artefact.tensors"  # safetensors; under that name vLLM would take it for weights
_LARGEST = 2**26  # of artefact.json
_STATE = ("scale", "zero_point", "offset", "global_scale")  # of a FakeQuantizer
ROUTING = "routing."  # before the names of a Routing
GENERATED = ("ids", "mask", "tokens", "words", "logits", "reach")  # of a Generation
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
        batch: whether it is a mapping, a sequence, or one tensor; the tensors are in artefact.tensors.
        others: its values that are no tensors, by name or place.
        answers: the names of the outputs, in their order.
        every, allowed, allowed_nats, allowed_flip: see `Answers`.
        allowed_decoding: see `Generation`; None where nothing was generated, or nobody recorded it.
    """

    batch: Literal["mapping", "sequence", "tensor"]
    others: dict[str, Scalar]
    answers: tuple[str, ...]
    every: int
    allowed: float
    allowed_nats: float | None
    allowed_flip: float | None = None
    allowed_decoding: float | None = None


@with_config(extra="forbid")
@dataclass(frozen=True, kw_only=True)
class Cache:
    """What is quantized of a KV cache; the scales are in artefact.tensors.

    Args:
        spec: of keys and values.
        names: of their quantizers.
    """

    spec: QuantSpec
    names: tuple[str, ...]


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
        lattices: of quantizers that belong to none of the modules, as those of outputs, by name.
        example: None where the batch could not be recorded, or nobody did.
        cache: None where keys and values stay in float.
        files: all others, by their path in the folder; None where nobody noted them.
    """

    format: int
    recoup: str | None
    target: str
    schemes: dict[str, Scheme] = field(default_factory=dict)
    modules: dict[str, Module] | None = None
    lattices: dict[str, QuantSpec] = field(default_factory=dict)
    example: Example | None = None
    cache: Cache | None = None
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


def to_json(artefact: Artefact) -> dict[str, Any]:
    """Plain data, from which `parse` makes an equal one."""
    return _ADAPTER.dump_python(artefact, mode="json")


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


def generation_of(artefact: Artefact, tensors: Mapping[str, Tensor]) -> Generation | None:
    """What the trained model generated; None where that was not recorded.

    Raises:
        ValueError: tensors are missing, or do not belong together.
    """
    found, own = artefact.example, _with_prefix(tensors, "generation.")
    if found is None or found.allowed_decoding is None:
        return None
    if set(own) != set(GENERATED) or not _belong_together(**own):
        raise ValueError(f"{TENSORS}: not the words that were generated for {FILE}; export it again")
    return Generation(allowed=found.allowed_decoding, **own)


def routing_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The experts that the trained model chose; nothing of a model without."""
    return _with_prefix(tensors, ROUTING)


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


def state_of(kind: str, path: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a quantizer, "input" of a module or "lattice" of its own, as it was recorded."""
    return {name: tensors[key] for name in _STATE if (key := f"{kind}.{name}.{path}") in tensors}


def _belong_together(
    ids: Tensor, mask: Tensor, tokens: Tensor, words: Tensor, logits: Tensor, reach: Tensor
) -> bool:
    """Shapes and types as `Generation` has them."""
    shapes = (
        ids.ndim == tokens.ndim == 2,
        len(ids) == len(tokens),
        ids.shape == mask.shape,
        tokens.shape == reach.shape,
        logits.shape == (*tokens.shape, *words.shape),
    )
    types = (*(each.dtype == torch.int64 for each in (ids, mask, tokens, words)), logits.is_floating_point())
    return all((*shapes, *types))


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


_ADAPTER = TypeAdapter(Artefact)
