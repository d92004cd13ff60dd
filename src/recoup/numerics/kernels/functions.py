"""Fake quantization, and a whole linear layer, as functions that keep bytes where autograd keeps floats.

`linear` is y = Q(x) Q(W)^T + b. Written with `fake_quantize`, autograd keeps Q(x) and Q(W) in float32, and a
mask for each. Here their codes are kept, and both passes dequantize them; values and gradients are the same.
In float, and where a scale is learned, x itself is kept too. Who calls decides the codes, and so how long
they serve: a weight's for a step, an input's for all layers that read it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from recoup.numerics import fake_quantize as reference
from recoup.numerics.kernels.carrier import carrier_of
from recoup.numerics.kernels.choose import Kernels
from recoup.numerics.kernels.kept import Kept, may_saturate
from recoup.numerics.kernels.place import place
from recoup.numerics.low_rank import LowRank, gradients, merged
from recoup.numerics.spec import QParams, QuantSpec

_FIELDS = ("scale", "zero_point", "offset", "global_scale")  # of QParams


def fake_quantize(
    x: Float[Tensor, "r c"],
    qparams: QParams,
    spec: QuantSpec,
    kernels: Kernels,
    moved: Float[Tensor, "r c"] | None = None,
) -> Float[Tensor, "r c"]:
    """See `numerics.fake_quantize`."""
    return cast(Tensor, _FakeQuantize.apply(x, moved, kernels, spec, *_tensors(qparams)))


def linear(
    x: Float[Tensor, "*n i"],
    of_x: tuple[QParams, Kept] | None,
    weight: Float[Tensor, "o i"],
    of_weight: tuple[QParams, Kept],
    bias: Float[Tensor, " o"] | None,
    kernels: Kernels,
    low_rank: LowRank | None = None,
) -> Float[Tensor, "*n o"]:
    """F.linear(fake_quantize(x), fake_quantize(weight + low_rank), bias).

    Args:
        x: the input, which gets a gradient.
        of_x: its qparams, which get one where they are learned, and what `kernels.keep` made of x's 2-D view
            and them; None leaves x in float. Gradients are of the codes that were kept, drawn ones too.
        weight: the master weight.
        of_weight: the same of the weight.
        bias: or none.
        kernels: an implementation.
        low_rank: whose factors get gradients; the sum is made again where the backward pass asks for it.
    """
    trained = (tensor for of in (of_x, of_weight) if _learned(of) for tensor in _tensors(cast(Any, of)[0]))
    codes, product = None if of_x is None else of_x[1], low_rank or (None, None, None)
    return cast(Tensor, _Linear.apply(x, weight, bias, *product, codes, of_weight[1], kernels, *trained))


def _learned(of: tuple[QParams, Kept] | None) -> bool:
    return of is not None and of[1].spec.ranges == "learned"


@dataclass(slots=True)
class _Factor:
    """A quantized tensor, or x in float: what is kept of it, its values, and its gradients."""

    kernels: Kernels
    whole: Tensor | None
    codes: Kept | None

    def values(self, name: str, own: torch.dtype, wanted: torch.dtype) -> Tensor:
        """What takes part in the product, rounded to its own dtype, in the one that is wanted."""
        if self.codes is not None:
            codes = self.codes.values
            return self.kernels.restore(self.codes, place(name, codes.shape, own, codes.device)).to(wanted)
        assert self.whole is not None, "a factor without codes is in float"
        return self.whole.to(wanted)

    def gradients(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of the tensor and, if they are learned, of its qparams, from that of its values.

        That one is written over.
        """
        if self.codes is None:
            return (grad,)
        if self.codes.spec.ranges != "learned":
            return (self.kernels.clip_(grad, self.codes),)
        leaves = [None if t is None else t.detach() for t in (self.whole, *_tensors(self.codes.qparams))]
        trained = [leaf.requires_grad_() for leaf in leaves if leaf is not None and leaf.is_floating_point()]
        values = self.codes.values  # which were decided once, and maybe drawn
        moved = self.kernels.restore(self.codes, place("moved", values.shape, torch.float32, values.device))
        with torch.enable_grad():
            y = reference(cast(Tensor, leaves[0]), _qparams(leaves[1:]), self.codes.spec, moved)
        found = torch.autograd.grad(y, trained, grad, allow_unused=True)
        by_leaf = dict(zip(map(id, trained), found, strict=True))
        return tuple(by_leaf.get(id(leaf)) for leaf in leaves)


def _saved(x: Tensor, codes: Kept | None) -> tuple[Tensor | None, ...]:
    """What the backward pass needs of a tensor, as tensors that autograd's hooks may move or drop."""
    if codes is None:
        return (x,)
    whole = x if codes.spec.ranges == "learned" else None
    return whole, codes.values, codes.saturated, *_tensors(codes.qparams)


def _restored(kernels: Kernels, spec: QuantSpec | None, saved: Sequence[Tensor | None]) -> _Factor:
    """The inverse of `_saved`."""
    if spec is None:
        return _Factor(kernels, saved[0], None)
    whole, values, saturated, *qparams = saved
    assert values is not None, "codes were saved"
    kept = Kept(values=values, saturated=saturated, qparams=_qparams(qparams), spec=spec)
    return _Factor(kernels, whole, kept)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, moved: Tensor | None, kernels: Kernels, spec: QuantSpec, *qparams: Tensor | None
    ) -> Tensor:
        codes = kernels.keep(x if moved is None else moved, _qparams(qparams), spec, None)
        ctx.kernels, ctx.spec = kernels, spec
        ctx.save_for_backward(*_saved(x, codes))
        return kernels.restore(codes, torch.empty_like(x, memory_format=torch.contiguous_format))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        factor = _restored(ctx.kernels, ctx.spec, ctx.saved_tensors)
        written_over = may_saturate(ctx.spec, carrier_of(ctx.spec.format))
        owned = grad.clone(memory_format=torch.contiguous_format) if written_over else grad
        of_x, *of_qparams = factor.gradients(owned)
        return of_x, None, None, None, *(of_qparams or (None,) * len(_FIELDS))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        scaling: float | None,
        codes_of_x: Kept | None,
        codes_of_weight: Kept,
        kernels: Kernels,
        *_trained: Tensor | None,
    ) -> Tensor:
        spec = None if codes_of_x is None else codes_of_x.spec
        whole = weight if codes_of_weight.spec.ranges == "learned" else None
        ctx.save_for_backward(whole, a, b, *_saved(x.reshape(-1, x.shape[-1]), codes_of_x))
        ctx.scaling = scaling
        # A weight's codes outlive this graph, so hooks need not move them.
        ctx.of_weight = codes_of_weight, _version(codes_of_weight.values)
        ctx.kernels, ctx.spec, ctx.x, ctx.weight = kernels, spec, (x.shape, x.dtype), weight.dtype
        ctx.transposed = not weight.is_contiguous()
        if codes_of_x is not None:
            room = place("x", codes_of_x.values.shape, x.dtype, x.device)
            x = kernels.restore(codes_of_x, room).view(x.shape)
        values = kernels.restore(codes_of_weight, place("weight", weight.shape, weight.dtype, x.device))
        y = F.linear(x, _laid(values, ctx.transposed), bias)
        # A view could not be written to in place afterwards.
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y  # pyright: ignore[reportPrivateUsage]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        whole, a, b, *saved = ctx.saved_tensors  # once: checkpointing computes them again at every asking
        kernels, (codes, version), (shape, dtype) = ctx.kernels, ctx.of_weight, ctx.x
        if _version(codes.values) != version:
            raise RuntimeError(
                "a weight was modified by an inplace operation, and used again, after the forward pass whose "
                "gradient is asked for; call backward() before the optimizer's step"
            )
        low_rank = None if a is None else LowRank(a, b, ctx.scaling)
        whole = None if whole is None else merged(whole, low_rank)
        x, weight = _restored(kernels, ctx.spec, saved), _Factor(kernels, whole, codes)
        grad = grad.reshape(-1, grad.shape[-1])
        for_x, for_weight, for_bias, for_a, for_b, _, _, _, _, *trained = ctx.needs_input_grad
        learned = ctx.spec is not None and ctx.spec.ranges == "learned"
        count = len(_FIELDS) if learned else 0
        of_x: tuple[Tensor | None, ...] = (None,) * (1 + count)
        of_weight: tuple[Tensor | None, ...] = (None,) * (1 + len(trained) - count)
        if for_x or any(trained[:count]):
            values = weight.values("weight", ctx.weight, grad.dtype)
            of_x = x.gradients(grad @ _laid(values, ctx.transposed))
        if for_weight or for_a or for_b or any(trained[count:]):
            seen = x.values("x", dtype, grad.dtype)
            of_weight = weight.gradients((seen.T @ grad).T.contiguous() if ctx.transposed else grad.T @ seen)
        bias = grad.sum(0) if for_bias else None
        grad_x = None if of_x[0] is None else of_x[0].view(shape)
        of_product = (None, None)
        if low_rank is not None and of_weight[0] is not None:
            of_product = gradients(of_weight[0], low_rank)
        own = of_weight[0] if for_weight else None
        return grad_x, own, bias, *of_product, None, None, None, None, *of_x[1:], *of_weight[1:]


def _laid(weight: Tensor, transposed: bool) -> Tensor:
    """As the float weight lies in memory: a product's last bits hang on that on some processors."""
    return weight.T.contiguous().T if transposed else weight


def _version(tensor: Tensor) -> int:
    """What writing in place moves; inference tensors have none."""
    return 0 if tensor.is_inference() else tensor._version  # pyright: ignore[reportPrivateUsage]


def _tensors(qparams: QParams) -> tuple[Tensor | None, ...]:
    return qparams.scale, qparams.zero_point, qparams.offset, qparams.global_scale


def _qparams(tensors: Sequence[Tensor | None]) -> QParams:
    scale, zero_point, offset, global_scale = tensors
    assert scale is not None, "every lattice has a scale"
    return QParams(scale=scale, zero_point=zero_point, offset=offset, global_scale=global_scale)
