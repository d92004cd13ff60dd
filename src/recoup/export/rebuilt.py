"""A quantized module made again from what its bytes hold and what the folder recorded of it.

It is the module that was trained: the same class, whose forward is the same equation, with the same codes. So
a file is compared with it later by the same bounds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
from pydantic import with_config
from torch import Tensor, nn

from recoup.export.parity import Array, ParityError
from recoup.export.trained import Layer, Stored
from recoup.nn import (
    CODED_MODULES,
    CodedConv,
    CodedConvTranspose,
    CodedEmbedding,
    CodedModule,
    Codes,
    FakeQuantizer,
)
from recoup.numerics import QParams, QuantSpec

KINDS: dict[str, type] = {kind.__name__.removeprefix("Coded"): kind for kind in CODED_MODULES.values()}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MOST_PADDING = 1024  # a folder may say anything, and what it says is allocated
_TYPES = {
    "zero_point": torch.int32,
    "bias_codes": torch.int32,
}  # of tensors that are neither codes nor float32


@with_config(extra="forbid")
@dataclass(frozen=True, kw_only=True)
class Convolution:
    """What a convolution has beside its codes, as torch's convolutions call it."""

    in_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | Literal["same", "valid"]
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]
    dilation: tuple[int, ...]
    groups: int
    output_padding: tuple[int, ...] | None = None

    @classmethod
    def of(cls, module: CodedModule) -> "Convolution | None":
        """That of a module; None for one that is no convolution."""
        if not isinstance(module, CodedConv):
            return None
        return cls(
            **{name: getattr(module, name) for name in cls.__dataclass_fields__ if hasattr(module, name)}
        )

    def edges(self) -> tuple[int, ...]:
        """The padding as F.pad takes it, last axis first."""
        pairs: list[tuple[int, int]] = []
        for axis in reversed(range(len(self.kernel_size))):
            span = self.dilation[axis] * (self.kernel_size[axis] - 1)
            if isinstance(self.padding, str):
                before = span // 2 if self.padding == "same" else 0
                pairs.append((before, span - before if self.padding == "same" else 0))
            else:
                pairs.append((self.padding[axis], self.padding[axis]))
        return tuple(edge for pair in pairs for edge in pair)

    def check(self, path: str, kind: type[CodedConv], columns: int) -> None:
        """Can a matrix of so many columns be such a convolution of this type?

        Raises:
            ValueError: no.
        """
        numbers = [self.kernel_size, self.stride, self.dilation]
        numbers += [] if isinstance(self.padding, str) else [self.padding]
        transposed = issubclass(kind, CodedConvTranspose)
        numbers += [] if self.output_padding is None else [self.output_padding]
        fits = all(len(each) == kind.axes for each in numbers)
        fits = fits and transposed == (self.output_padding is not None)
        fits = fits and not (transposed and (isinstance(self.padding, str) or self.padding_mode != "zeros"))
        fits = fits and all(0 <= edge <= _MOST_PADDING for edge in self.output_padding or ())
        fits = (
            fits and min(*self.kernel_size, *self.stride, *self.dilation, self.groups, self.in_channels) > 0
        )
        fits = fits and all(0 <= edge <= _MOST_PADDING for edge in self.edges())
        if not fits or self.in_channels // self.groups * torch.Size(self.kernel_size).numel() != columns:
            raise ValueError(f"{path}: {self} is no convolution of {columns} columns")


def canonical(name: str, array: Array, spec: QuantSpec) -> Tensor:
    """What was read back, in the type in which a module holds it."""
    dtype = spec.format.code_dtype if name == "codes" else _TYPES.get(name, torch.float32)
    return torch.from_numpy(array.copy()).to(dtype)


def rebuilt(
    path: str,
    layer: Layer,
    stored: Stored,
    *,
    dtype: torch.dtype,
    convolution: Convolution | None,
    bias: Tensor | None,
    inputs: Mapping[str, Tensor],
) -> CodedModule:
    """The module.

    Args:
        path: its name, for messages.
        layer: its scheme, type and shape.
        stored: what its bytes hold.
        dtype: of the weight that it decodes to.
        convolution: for a module that is one.
        bias: for a module that has one.
        inputs: the state of its input quantizer.

    Raises:
        ParityError: the bytes hold other tensors than the scheme has.
        ValueError: what was recorded does not belong together.
    """
    spec, (rows, columns) = layer.scheme.weights, layer.shape
    tensors = {name: canonical(name, array, spec) for name, array in stored.items()}
    if "global_divisor" in tensors:
        tensors["global_scale"] = 1 / tensors["global_divisor"]
    shapes = {"codes": layer.shape, "global_scale": ()}
    held = ["codes", "scale", *(["zero_point"] if spec.has_zero_point else [])]
    held += ["offset"] * spec.has_offset + ["global_scale"] * spec.global_scale
    for name in held:
        shape = shapes.get(name, spec.granularity.scale_shape(rows, columns))
        if name not in tensors or tensors[name].shape != shape:
            raise ParityError(f"{path}: no {name.replace('_', ' ')} of the shape {tuple(shape)}")
    qparams = QParams(**{name: tensors[name] for name in held if name != "codes"})
    codes = Codes(tensors["codes"], qparams, spec, dtype)
    if issubclass(layer.kind, CodedEmbedding):
        parts: dict[str, Any] = {"num_embeddings": rows, "embedding_dim": columns}
    else:
        if bias is not None and bias.shape != (rows,):
            raise ValueError(f"{path}: a bias of the shape {tuple(bias.shape)} for {rows} rows")
        parts = {"bias": bias, "bias_codes": tensors.get("bias_codes")}
        parts |= {"input_quantizer": _quantizer(path, layer, columns, inputs)}
        if issubclass(layer.kind, CodedConv):
            parts |= _convolution(path, layer, convolution)
        else:
            parts |= {"in_features": columns, "out_features": rows}
    prepared: Any = SimpleNamespace(scheme=layer.scheme, **parts)
    return layer.kind(prepared, codes).eval()


def quantizer(
    path: str, spec: QuantSpec, *, columns: int | None, state: Mapping[str, Tensor]
) -> FakeQuantizer:
    """The quantizer of an input, or of keys or values.

    Args:
        path: its name, for messages.
        spec: the lattice.
        columns: as `FakeQuantizer` has them.
        state: its scales.

    Raises:
        ValueError: that is not its state.
    """
    made = FakeQuantizer(spec, rows=None, columns=columns)
    made.path = path
    try:
        made.load_state_dict(dict(state))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not the state of its quantizer ({reason})") from None
    return made


def _convolution(path: str, layer: Layer, convolution: Convolution | None) -> dict[str, Any]:
    if convolution is None:
        raise ValueError(f"{path}: a convolution without its strides and padding")
    assert issubclass(layer.kind, CodedConv)
    convolution.check(path, layer.kind, layer.shape[1])
    found = {name: getattr(convolution, name) for name in convolution.__dataclass_fields__}
    return found | {
        "out_channels": layer.shape[0],
        "_reversed_padding_repeated_twice": convolution.edges(),
    }


def _quantizer(
    path: str, layer: Layer, columns: int, state: Mapping[str, Tensor]
) -> FakeQuantizer | nn.Identity:
    spec = layer.scheme.inputs
    if spec is None:
        return nn.Identity()
    features = None if issubclass(layer.kind, CodedConv) else columns
    return quantizer(f"{path}.input", spec, columns=features, state=state)
