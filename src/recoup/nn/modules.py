"""The float modules' quantized twins, for calibration and training.

Each holds the float module's own Parameters, so optimizers made earlier keep working and tied weights
stay tied, and a fake quantizer for every tensor that its scheme names. Its forward is the equation.
"""

import sys
from functools import partial
from typing import ClassVar, Self, TypeGuard

import torch.nn.functional as F
from torch import Tensor, nn

from recoup.nn.attention import QuantMultiheadAttention
from recoup.nn.batch_norm import BatchNorm, folded, norm_of
from recoup.nn.conv import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
)
from recoup.nn.experts import QuantExperts, is_experts
from recoup.nn.fake_quantizer import FakeQuantizer
from recoup.nn.fused import fused_linear, fuses
from recoup.nn.integer_bias import seen_bias
from recoup.nn.lora import LoRA, low_rank_of
from recoup.nn.own_forward import QuantOwnForward, layout_of
from recoup.nn.recurrent import QuantGRU, QuantLSTM
from recoup.nn.twin import (
    Inputs,
    QuantModule,
    adopt,
    input_quantizer,
    output_of,
    weight_names,
    weight_quantizer,
)
from recoup.numerics import merged
from recoup.schemes import Scheme


class QuantLinear(nn.Linear):
    """y = Q(x) Q(W)^T + b, or y = Q(x) Q(W + s B A)^T + b with an adapter."""

    inputs_are: ClassVar[Inputs] = "tokens"
    scheme: Scheme
    weight_quantizer: FakeQuantizer
    input_quantizer: FakeQuantizer | nn.Identity
    lora: LoRA | None
    batch_norm: BatchNorm | None

    @classmethod
    def from_float(cls, module: nn.Linear, scheme: Scheme, path: str) -> Self:
        """The twin of a float module; it shares every Parameter.

        Args:
            module: what is replaced.
            scheme: the specs of its weight and input.
            path: its name in the model, for messages.

        Raises:
            ValueError: the weight does not fit the scheme's blocks or is not finite.
        """
        twin = adopt(cls, module, path)
        twin.scheme, twin.lora, twin.batch_norm = scheme, None, None
        twin.weight_quantizer = weight_quantizer(cls.matrix(module), scheme, path)
        twin.input_quantizer = input_quantizer(module.in_features, scheme, path, module.weight.device)
        return twin

    @staticmethod
    def matrix(module: nn.Linear) -> Tensor:
        """The weight itself, with what an adapter adds, and with the factors of a norm."""
        return folded(module, merged(module.weight, low_rank_of(module)))

    def stored(self, matrix: Tensor) -> Tensor:
        """The 2-D view, put back as torch takes it."""
        return matrix

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """The equation."""
        return _linear(self, input, self.weight)


class QuantConv1D(nn.Module):
    """y = Q(x) Q(W^T)^T + b, or y = Q(x) Q(W^T + s B A)^T + b with an adapter.

    GPT-2's linear layer, from transformers, whose weight is (in, out). It has nothing to do with nn.Conv1d
    but the name.
    """

    inputs_are: ClassVar[Inputs] = "tokens"
    nf: int
    nx: int
    weight: Tensor
    bias: Tensor
    scheme: Scheme
    weight_quantizer: FakeQuantizer
    input_quantizer: FakeQuantizer | nn.Identity
    lora: LoRA | None

    @classmethod
    def from_float(cls, module: nn.Module, scheme: Scheme, path: str) -> Self:
        """The twin of a float module; it shares every Parameter. See `QuantLinear.from_float`."""
        twin = adopt(cls, module, path)
        twin.scheme, twin.lora = scheme, None
        twin.weight_quantizer = weight_quantizer(cls.matrix(twin), scheme, path)
        twin.input_quantizer = input_quantizer(twin.nx, scheme, path, twin.weight.device)
        return twin

    @staticmethod
    def matrix(module: "QuantConv1D") -> Tensor:
        """The weight as (out, in), with what an adapter adds."""
        return merged(module.weight.T, low_rank_of(module))

    @property
    def in_features(self) -> int:
        """As nn.Linear calls it."""
        return self.nx

    @property
    def out_features(self) -> int:
        """As nn.Linear calls it."""
        return self.nf

    def forward(self, x: Tensor) -> Tensor:
        """The equation."""
        return _linear(self, x, self.weight.T)


def _linear(module: QuantLinear | QuantConv1D, x: Tensor, weight: Tensor) -> Tensor:
    """F.linear of quantized tensors, as one function where that is the same."""
    low_rank = None if module.lora is None else module.lora.drawn()
    of_x, of_weight = module.input_quantizer, module.weight_quantizer
    if norm_of(module) is None and fuses(x, of_x, of_weight):
        return fused_linear(x, weight, seen_bias(module), of_x, of_weight, low_rank)
    rows = merged(weight, low_rank)
    return output_of(module, of_weight(folded(module, rows)), rows, partial(F.linear, of_x(x)))


class QuantEmbedding(nn.Embedding):
    """y = Q(W)[ids]."""

    inputs_are: ClassVar[Inputs] = "ids"
    scheme: Scheme
    weight_quantizer: FakeQuantizer

    @classmethod
    def from_float(cls, module: nn.Embedding, scheme: Scheme, path: str) -> Self:
        """The twin of a float module; it shares the weight. See `QuantLinear.from_float`.

        Raises:
            ValueError: also for `max_norm`, which changes the weight during the forward pass, and for
                sparse gradients, which rounding does not pass on.
        """
        _rounds_like_any(module, path)
        twin = adopt(cls, module, path)
        twin.scheme = scheme
        twin.weight_quantizer = weight_quantizer(cls.matrix(module), scheme, path)
        return twin

    @staticmethod
    def matrix(module: nn.Embedding) -> Tensor:
        """The weight itself: a row is the vector of one id."""
        return module.weight

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """The equation."""
        weight = self.weight_quantizer(self.weight)
        return F.embedding(input, weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)


class QuantEmbeddingBag(nn.EmbeddingBag):
    """y = the sum, mean or maximum of Q(W)[ids] over each bag, with nn.EmbeddingBag's bags."""

    inputs_are: ClassVar[Inputs] = "ids"
    scheme: Scheme
    weight_quantizer: FakeQuantizer

    @classmethod
    def from_float(cls, module: nn.EmbeddingBag, scheme: Scheme, path: str) -> Self:
        """The twin of a float module; it shares the weight. Raises as `QuantEmbedding.from_float`."""
        _rounds_like_any(module, path)
        twin = adopt(cls, module, path)
        twin.scheme = scheme
        twin.weight_quantizer = weight_quantizer(cls.matrix(module), scheme, path)
        return twin

    @staticmethod
    def matrix(module: nn.EmbeddingBag) -> Tensor:
        """The weight itself: a row is the vector of one id."""
        return module.weight

    def forward(
        self,
        input: Tensor,  # noqa: A002 (torch's name)
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """The equation."""
        return F.embedding_bag(
            input, self.weight_quantizer(self.weight), offsets,
            scale_grad_by_freq=self.scale_grad_by_freq, mode=self.mode,
            per_sample_weights=per_sample_weights, include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
        )  # fmt: skip


def _rounds_like_any(module: nn.Embedding | nn.EmbeddingBag, path: str) -> None:
    """Its weight is read as it is, and its gradient is a tensor like any.

    Raises:
        ValueError: no.
    """
    if module.max_norm is not None:
        raise ValueError(
            f"{path}: an embedding with max_norm rescales its weight as it runs; keep it in float"
        )
    if module.sparse:
        raise ValueError(f"{path}: an embedding with sparse gradients asked; build it with sparse=False")


# Keys are names, so that a type from an optional package needs no import here.
QUANT_MODULES: dict[str, type[QuantModule]] = {
    "torch.nn.Linear": QuantLinear,
    "torch.nn.Conv1d": QuantConv1d,
    "torch.nn.Conv2d": QuantConv2d,
    "torch.nn.Conv3d": QuantConv3d,
    "torch.nn.ConvTranspose1d": QuantConvTranspose1d,
    "torch.nn.ConvTranspose2d": QuantConvTranspose2d,
    "torch.nn.ConvTranspose3d": QuantConvTranspose3d,
    "torch.nn.Embedding": QuantEmbedding,
    "torch.nn.EmbeddingBag": QuantEmbeddingBag,
    "torch.nn.LSTM": QuantLSTM,
    "torch.nn.GRU": QuantGRU,
    "torch.nn.MultiheadAttention": QuantMultiheadAttention,
    "transformers.pytorch_utils.Conv1D": QuantConv1D,
    "transformers.models.falcon.modeling_falcon.FalconLinear": QuantLinear,  # W x + b, too
}


# What a subclass may not replace, to compute as its parent does.
_COMPUTING = frozenset(
    {"forward", "_conv_forward", "_output_padding", "__call__", "_call_impl", "__getattr__", "weight", "bias"}
)


def is_prepared(module: nn.Module) -> TypeGuard[QuantModule]:
    """A quantized twin.

    Not isinstance of the protocol: from Python 3.12 on that does not see Parameters.
    """
    return type(module) in (*QUANT_MODULES.values(), QuantExperts, QuantOwnForward)


def quant_type(module: nn.Module) -> type[QuantModule] | None:
    """The twin's type for this type of module, with weights of its own.

    A subclass that computes as its parent does has the parent's twin. One with a forward of its own may
    compute anything, and its twin runs that. Weights that are computed from other parameters, as by
    weight_norm and pruning, have none. Layers of experts have a type for each model, and are known by the
    decorator that computes all of them.
    """
    kind = type(module)
    twin = next((twin for name, twin in QUANT_MODULES.items() if _computes_as(name, twin, kind)), None)
    if twin is None:
        if is_experts(module):
            return QuantExperts
        if is_prepared(module) or not layout_of(module):
            return None
        twin = QuantOwnForward
    weights = (getattr(module, name, None) for name in weight_names(twin, module))
    return twin if all(isinstance(w, nn.Parameter) and w.is_floating_point() for w in weights) else None


def _computes_as(name: str, twin: type[QuantModule], kind: type[nn.Module]) -> bool:
    """Is this the type of that name, or one that replaces nothing of how it computes?"""
    package, _, attribute = name.rpartition(".")
    known = getattr(sys.modules.get(package), attribute, None)
    if known is None or kind is known:
        return known is not None
    between = kind.__mro__[: kind.__mro__.index(known)] if issubclass(kind, known) else ()
    return (
        bool(between)
        and twin.inputs_are in ("tokens", "channels")
        and not any(_COMPUTING.intersection(vars(parent)) for parent in between)
    )
