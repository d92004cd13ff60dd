"""Fake quantization, and a whole linear layer, as functions that keep bytes where autograd keeps floats.

`linear` is y = Q(x) Q(W)^T + b. Written with `fake_quantize`, autograd keeps Q(x) and Q(W) in float32, and a
mask for each. Here their codes are kept, and both passes dequantize them; values and gradients are the same.
In float, and where a scale is learned, x itself is kept too. Who calls decides the codes, and so how long
they serve: a weight's for a step, an input's for all layers that read it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
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
from recoup.numerics.spec import QParams, QuantSpec

_FIELDS = tuple(field.name for field in fields(QParams))


def fake_quantize(
    x: Float[Tensor, "r c"], qparams: QParams, spec: QuantSpec, kernels: Kernels
) -> Float[Tensor, "r c"]:
    """See `numerics.fake_quantize`."""
    return cast(Tensor, _FakeQuantize.apply(x, kernels, spec, *_tensors(qparams)))


def linear(
    x: Float[Tensor, "*n i"],
    of_x: tuple[QParams, Kept] | None,
    weight: Float[Tensor, "o i"],
    of_weight: tuple[QParams, Kept],
    bias: Float[Tensor, " o"] | None,
    kernels: Kernels,
) -> Float[Tensor, "*n o"]:
    """F.linear(fake_quantize(x), fake_quantize(weight), bias).

    Args:
        x: the input, which gets a gradient.
        of_x: its qparams, which get one where they are learned, and what `kernels.keep` made of x's 2-D view
            and them; None leaves x in float.
        weight: the master weight.
        of_weight: the same of the weight.
        bias: or none.
        kernels: an implementation.
    """
    qparams, codes = (None, None) if of_x is None else of_x
    given = (codes, of_weight[1], kernels, *_tensors(qparams), *_tensors(of_weight[0]))
    return cast(Tensor, _Linear.apply(x, weight, bias, *given))


@dataclass(slots=True)
class _Factor:
    """A quantized tensor, or x in float: what is kept of it, its values, and its gradients."""

    kernels: Kernels
    whole: Tensor | None
    codes: Kept | None

    @classmethod
    def of(cls, kernels: Kernels, spec: QuantSpec | None, saved: Sequence[Tensor | None]) -> "_Factor":
        """The inverse of `saved`."""
        whole, values, saturated, *qparams = saved
        if spec is None:
            return cls(kernels, whole, None)
        assert values is not None, "codes were saved"
        kept = Kept(values=values, saturated=saturated, qparams=_qparams(qparams), spec=spec)
        return cls(kernels, whole, kept)

    @property
    def spec(self) -> QuantSpec | None:
        return None if self.codes is None else self.codes.spec

    def saved(self) -> tuple[Tensor | None, ...]:
        """What the backward pass needs, as tensors that autograd's hooks may move or drop."""
        if self.codes is None:
            return self.whole, None, None, *_tensors(None)
        whole = self.whole if self.codes.spec.ranges == "learned" else None
        return whole, self.codes.values, self.codes.saturated, *_tensors(self.codes.qparams)

    def values(self, out: Tensor) -> Tensor:
        """What takes part in the product, in the memory of `out` or in its own."""
        if self.codes is not None:
            return self.kernels.restore(self.codes, out)
        assert self.whole is not None, "a factor without codes is in float"
        return self.whole.to(out.dtype)

    def gradients(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of the tensor and of its qparams, from that of its values, which is written over."""
        if self.codes is None:
            return grad, *_tensors(None)
        if self.codes.spec.ranges != "learned":
            return self.kernels.clip_(grad, self.codes), *_tensors(None)
        leaves = [None if t is None else t.detach() for t in (self.whole, *_tensors(self.codes.qparams))]
        trained = [leaf.requires_grad_() for leaf in leaves if leaf is not None and leaf.is_floating_point()]
        with torch.enable_grad():
            y = reference(cast(Tensor, leaves[0]), _qparams(leaves[1:]), self.codes.spec)
        found = torch.autograd.grad(y, trained, grad, allow_unused=True)
        by_leaf = dict(zip(map(id, trained), found, strict=True))
        return tuple(by_leaf.get(id(leaf)) for leaf in leaves)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Kernels, spec: QuantSpec, *qparams: Tensor | None) -> Tensor:
        factor = _Factor(kernels, x, kernels.keep(x, _qparams(qparams), spec, None))
        ctx.kernels, ctx.spec = kernels, spec
        ctx.save_for_backward(*factor.saved())
        return factor.values(torch.empty_like(x, memory_format=torch.contiguous_format))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        factor = _Factor.of(ctx.kernels, ctx.spec, ctx.saved_tensors)
        written_over = may_saturate(ctx.spec, carrier_of(ctx.spec.format))
        owned = grad.clone(memory_format=torch.contiguous_format) if written_over else grad
        of_x, *of_qparams = factor.gradients(owned)
        return of_x, None, None, *of_qparams


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        codes_of_x: Kept | None,
        codes_of_weight: Kept,
        kernels: Kernels,
        *_qparams: Tensor | None,
    ) -> Tensor:
        view = x.reshape(-1, x.shape[-1])
        factors = _Factor(kernels, view, codes_of_x), _Factor(kernels, weight, codes_of_weight)
        ctx.kernels, ctx.specs = kernels, [factor.spec for factor in factors]
        ctx.shape, ctx.places = x.shape, ((view.shape, x.dtype), (weight.shape, weight.dtype))
        ctx.save_for_backward(*(tensor for factor in factors for tensor in factor.saved()))
        of_x = factors[0].values(place("x", view.shape, x.dtype, x.device))
        of_weight = factors[1].values(place("weight", weight.shape, weight.dtype, x.device))
        y = F.linear(of_x.view(x.shape), of_weight, bias)
        return torch.ops.aten._unsafe_view(y, y.shape)  # a view could not be written to in place afterwards

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = ctx.saved_tensors  # asked once: checkpointing computes them again at every asking
        half = len(saved) // 2
        x = _Factor.of(ctx.kernels, ctx.specs[0], saved[:half])
        weight = _Factor.of(ctx.kernels, ctx.specs[1], saved[half:])
        grad = grad.reshape(-1, grad.shape[-1])
        places = [
            place(name, shape, dtype, grad.device)
            for name, (shape, dtype) in zip(("x", "weight"), ctx.places, strict=True)
        ]
        for_x, for_weight, for_bias, _, _, _, *for_qparams = ctx.needs_input_grad
        of_x = of_weight = (None,) * (1 + len(_FIELDS))
        if for_x or any(for_qparams[: len(_FIELDS)]):
            of_x = x.gradients(grad @ weight.values(places[1]).to(grad.dtype))
        if for_weight or any(for_qparams[len(_FIELDS) :]):
            of_weight = weight.gradients(grad.T @ x.values(places[0]).to(grad.dtype))
        bias = grad.sum(0) if for_bias else None
        grad_x = None if of_x[0] is None else of_x[0].view(ctx.shape)
        return grad_x, of_weight[0], bias, None, None, None, *of_x[1:], *of_weight[1:]


def _tensors(qparams: QParams | None) -> tuple[Tensor | None, ...]:
    return tuple(getattr(qparams, name, None) for name in _FIELDS)


def _qparams(tensors: Sequence[Tensor | None]) -> QParams:
    return QParams(**dict(zip(_FIELDS, tensors, strict=True)))  # pyright: ignore[reportArgumentType]
