"""The modules after conversion: codes and scales in place of float weights. What gets exported.

Codes lie one to a byte, in the shape of the weight's 2-D view; packing them is the exporter's business.
"""

from collections.abc import Callable
from copy import copy
from typing import Any, ClassVar, Protocol, Self, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recoup.nn.attention import Attention, QuantMultiheadAttention
from recoup.nn.conv import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
    transposed_weight,
)
from recoup.nn.experts import Experts, QuantExperts
from recoup.nn.fake_quantizer import FakeQuantizer, LatticeState
from recoup.nn.integer_bias import coded_bias
from recoup.nn.modules import QuantConv1D, QuantEmbedding, QuantEmbeddingBag, QuantLinear
from recoup.nn.own_forward import OwnForward, QuantOwnForward
from recoup.nn.recurrent import QuantGRU, QuantLSTM, QuantRecurrent, Rounded
from recoup.nn.twin import QuantModule, quantizers_of, weight_of
from recoup.numerics import QParams, QuantSpec, dequantize, quantize
from recoup.schemes import Scheme

# From the size that a caller asks to what outputs have at their end; of `self` it reads `output_padding`.
_output_padding: Any = nn.modules.conv._ConvTransposeNd._output_padding  # pyright: ignore


class Codes(LatticeState):
    """A quantized weight: `codes` (r, c), and the `scale`, `zero_point`, `offset` and `global_scale` of them.

    Args:
        codes: one to a byte.
        qparams: what they stand for.
        spec: the lattice.
        dtype: what they are decoded to.

    >>> import torch, recoup
    >>> model = torch.nn.Sequential(torch.nn.Linear(32, 4))
    >>> linear = recoup.prepare(model, recoup.resolve(model, "w4a16"))[0]
    >>> bool((Codes.of(linear).decode() == linear.weight_quantizer(linear.weight)).all())
    True
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    offset: Tensor | None
    global_scale: Tensor | None

    def __init__(self, codes: Tensor, qparams: QParams, spec: QuantSpec, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec, self.dtype = spec, dtype
        self.register_buffer("codes", codes)
        self.register_buffer("scale", qparams.scale.detach().clone())
        zero_point = qparams.zero_point
        self.register_buffer("zero_point", None if zero_point is None else zero_point.to(torch.int32))
        self.register_buffer("offset", None if qparams.offset is None else qparams.offset.detach().clone())
        self.register_buffer("global_scale", qparams.global_scale)

    @classmethod
    @torch.no_grad()
    def of(cls, prepared: QuantModule, name: str = "weight") -> Self:
        """Those of a prepared module: its weight of that name as fake quantization rounds it."""
        weight = weight_of(type(prepared), prepared, name).matrix
        quantizer = quantizers_of(prepared)[name]
        qparams = quantizer.qparams(weight)
        return cls(quantize(weight, qparams, quantizer.spec), qparams, quantizer.spec, weight.dtype)

    @property
    def qparams(self) -> QParams:
        """The scales as numerics take them."""
        return QParams(
            scale=self.scale, zero_point=self.zero_point, offset=self.offset, global_scale=self.global_scale
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype  # a cast changes what they are decoded to
        return super()._apply(fn, recurse)

    def decode(self) -> Tensor:
        """The weight's 2-D view that the codes stand for, in the dtype of the model."""
        return dequantize(self.codes, self.qparams, self.spec).to(self.dtype)


class CodedModule(Protocol):
    """What exporters know of a converted module; one whose codes have other names they refuse."""

    scheme: Scheme
    weight: Codes


class CodedLinear(nn.Module):
    """y = Q(x) decode(codes)^T + b."""

    bias_codes: Tensor | None

    def __init__(self, prepared: QuantLinear | QuantConv1D, weight: Codes | None = None) -> None:
        super().__init__()
        self.scheme = prepared.scheme
        self.in_features, self.out_features = prepared.in_features, prepared.out_features
        self.weight = Codes.of(prepared) if weight is None else weight
        bias, codes = _bias(prepared, weight)
        self.bias: Tensor | None = bias
        self.register_buffer("bias_codes", codes)
        self.input_quantizer: FakeQuantizer | nn.Identity = prepared.input_quantizer

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """The equation."""
        return F.linear(self.input_quantizer(input), self.weight.decode(), self.bias)


class CodedConv1D(CodedLinear):
    """The linear layer that GPT-2's Conv1D is; its codes are (out, in), as those of any."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] (GPT-2's name)
        """The equation."""
        return super().forward(x)


class CodedConv(nn.Module):
    """y = decode(codes) * Q(x) + b; a row of the codes is what one output channel sums over.

    Attributes are those of torch's convolutions. `edges` is the padding as F.pad takes it, last axis first,
    in every padding_mode and for padding="same" too.
    """

    axes: ClassVar[int]
    convolution: ClassVar[Callable[..., Tensor]]
    bias_codes: Tensor | None

    def __init__(self, prepared: Any, weight: Codes | None = None) -> None:
        super().__init__()
        self.scheme = prepared.scheme
        self.in_channels, self.out_channels = prepared.in_channels, prepared.out_channels
        self.kernel_size, self.stride = prepared.kernel_size, prepared.stride
        self.padding, self.padding_mode = prepared.padding, prepared.padding_mode
        self.edges = tuple(prepared._reversed_padding_repeated_twice)  # pyright: ignore[reportPrivateUsage]
        self.dilation, self.groups = prepared.dilation, prepared.groups
        self.weight = Codes.of(prepared) if weight is None else weight
        bias, codes = _bias(prepared, weight)
        self.bias: Tensor | None = bias
        self.register_buffer("bias_codes", codes)
        self.input_quantizer: FakeQuantizer | nn.Identity = prepared.input_quantizer

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """The equation."""
        return self.summed(self.input_quantizer(input), self.weight.decode(), self.bias)

    def summed(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """The sums of products of this geometry, with a weight's 2-D view; padded first."""
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self.edges, mode=self.padding_mode), 0
        weight = matrix.unflatten(1, (-1, *self.kernel_size))
        return self.convolution(x, weight, bias, self.stride, padding, self.dilation, self.groups)


class CodedConv1d(CodedConv):
    """Along one axis."""

    axes, convolution = 1, staticmethod(F.conv1d)


class CodedConv2d(CodedConv):
    """Along two axes."""

    axes, convolution = 2, staticmethod(F.conv2d)


class CodedConv3d(CodedConv):
    """Along three axes."""

    axes, convolution = 3, staticmethod(F.conv3d)


class CodedConvTranspose(CodedConv):
    """The same of a transposed convolution: an input is spread over outputs, and its padding cuts them.

    A row of the codes is what one output channel sums over here too.
    """

    def __init__(self, prepared: Any, weight: Codes | None = None) -> None:
        super().__init__(prepared, weight)
        self.output_padding: tuple[int, ...] = prepared.output_padding

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # noqa: A002 (torch's)
        """The equation."""
        extra = _output_padding(
            self, input, output_size, self.stride, self.padding, self.kernel_size, self.axes, self.dilation
        )
        return self.summed(self.input_quantizer(input), self.weight.decode(), self.bias, extra)

    def summed(
        self, x: Tensor, matrix: Tensor, bias: Tensor | None = None, extra: tuple[int, ...] | None = None
    ) -> Tensor:
        """The sums of products of this geometry, with a weight's 2-D view; cut afterwards.

        Args:
            x: the inputs.
            matrix: the view.
            bias: for each output channel.
            extra: what outputs have at their end beyond the shortest that fits; `output_padding` by default.
        """
        weight = transposed_weight(matrix, self.groups, self.kernel_size)
        extra = self.output_padding if extra is None else extra
        return self.convolution(x, weight, bias, self.stride, self.padding, extra, self.groups, self.dilation)


class CodedConvTranspose1d(CodedConvTranspose):
    """Along one axis."""

    axes, convolution = 1, staticmethod(F.conv_transpose1d)


class CodedConvTranspose2d(CodedConvTranspose):
    """Along two axes."""

    axes, convolution = 2, staticmethod(F.conv_transpose2d)


class CodedConvTranspose3d(CodedConvTranspose):
    """Along three axes."""

    axes, convolution = 3, staticmethod(F.conv_transpose3d)


class CodedEmbedding(nn.Module):
    """y = decode(codes)[ids]."""

    def __init__(self, prepared: QuantEmbedding, weight: Codes | None = None) -> None:
        super().__init__()
        self.scheme = prepared.scheme
        self.num_embeddings, self.embedding_dim = prepared.num_embeddings, prepared.embedding_dim
        self.weight = Codes.of(prepared) if weight is None else weight

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """The equation."""
        return F.embedding(input, self.weight.decode())


class CodedEmbeddingBag(nn.Module):
    """y = the sum, mean or maximum of decode(codes)[ids] over each bag."""

    def __init__(self, prepared: QuantEmbeddingBag, weight: Codes | None = None) -> None:
        super().__init__()
        self.scheme = prepared.scheme
        self.num_embeddings, self.embedding_dim = prepared.num_embeddings, prepared.embedding_dim
        self.mode, self.padding_idx = prepared.mode, prepared.padding_idx
        self.include_last_offset = prepared.include_last_offset
        self.weight = Codes.of(prepared) if weight is None else weight

    def forward(
        self,
        input: Tensor,  # noqa: A002 (torch's name)
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """The equation."""
        return F.embedding_bag(
            input, self.weight.decode(), offsets, mode=self.mode, per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset, padding_idx=self.padding_idx,
        )  # fmt: skip


class CodedExperts(Experts):
    """The same with decoded matrices; codes have the names of the Parameters."""

    def __init__(self, prepared: QuantExperts) -> None:
        nn.Module.__init__(self)
        _take_over(self, prepared)

    def matrices(self, name: str) -> Tensor:
        """The rounded matrices of this name, (experts, out, in)."""
        codes: Codes = getattr(self, name)
        return codes.decode().unflatten(0, (self.num_experts, -1))


class CodedRecurrent(Rounded):
    """Of codes, under the names of the Parameters."""

    scheme: Scheme

    def __init__(self, prepared: QuantRecurrent) -> None:
        nn.Module.__init__(self)
        _take_over(self, prepared)

    def rounded(self, name: str) -> Tensor:
        """The decoded weight; a bias as it is."""
        stored: Codes | Tensor = getattr(self, name)
        return stored.decode() if isinstance(stored, Codes) else stored


class CodedLSTM(CodedRecurrent, nn.LSTM):
    """nn.LSTM's equations with decode(codes)."""


class CodedGRU(CodedRecurrent, nn.GRU):
    """nn.GRU's equations with decode(codes)."""


class CodedMultiheadAttention(Attention):
    """The equation with decode(codes)."""

    def __init__(self, prepared: QuantMultiheadAttention) -> None:
        nn.Module.__init__(self)
        _take_over(self, prepared)

    def rounded(self, name: str) -> Tensor:
        """The decoded weight."""
        codes: Codes = getattr(self, name)
        return codes.decode()


class CodedOwnForward(OwnForward):
    """The float module's forward with decode(codes)."""

    def __init__(self, prepared: QuantOwnForward) -> None:
        nn.Module.__init__(self)
        _take_over(self, prepared)

    def rounded(self, name: str) -> Tensor:
        """The decoded 2-D view."""
        codes: Codes = getattr(self, name)
        return codes.decode()


CODED_MODULES: dict[type[nn.Module], Any] = {
    QuantLinear: CodedLinear,
    QuantConv1d: CodedConv1d,
    QuantConv2d: CodedConv2d,
    QuantConv3d: CodedConv3d,
    QuantConvTranspose1d: CodedConvTranspose1d,
    QuantConvTranspose2d: CodedConvTranspose2d,
    QuantConvTranspose3d: CodedConvTranspose3d,
    QuantEmbedding: CodedEmbedding,
    QuantEmbeddingBag: CodedEmbeddingBag,
    QuantConv1D: CodedConv1D,
    QuantExperts: CodedExperts,
    QuantLSTM: CodedLSTM,
    QuantGRU: CodedGRU,
    QuantMultiheadAttention: CodedMultiheadAttention,
    QuantOwnForward: CodedOwnForward,
}


def is_coded(module: nn.Module) -> TypeGuard[CodedModule]:
    """A converted module."""
    return type(module) in CODED_MODULES.values()


def _take_over(coded: nn.Module, prepared: nn.Module) -> None:
    """All that a prepared module with several weights has, but codes for its weights and their quantizers."""
    vars(coded).update({name: value for name, value in vars(prepared).items() if name not in vars(coded)})
    weights = quantizers_of(prepared)
    for name, child in prepared.named_children():
        if child not in weights.values():
            coded.add_module(name, child)
    for name, parameter in vars(prepared)["_parameters"].items():  # those that are None, too
        if name not in weights:
            coded.register_parameter(name, parameter)
    for held in ("_buffers", "_non_persistent_buffers_set"):
        vars(coded)[held] = copy(vars(prepared)[held])
    for name in weights:
        coded.add_module(name, Codes.of(cast(QuantModule, prepared), name))


def _bias(prepared: Any, weight: Codes | None) -> tuple[Tensor | None, Tensor | None]:
    """The bias and its codes: rounded here, or as they were stored beside the codes of the weight."""
    return coded_bias(prepared) if weight is None else (prepared.bias, prepared.bias_codes)
