"""The modules after conversion: codes and scales in place of float weights. What gets exported.

Codes lie one to a byte, in the weight's own shape; packing them is the exporter's business.
"""

from typing import Any, Protocol, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recoup.nn.fake_quantizer import FakeQuantizer, LatticeState
from recoup.nn.modules import QuantEmbedding, QuantLinear, QuantModule
from recoup.numerics import QParams, dequantize, quantize
from recoup.schemes import Scheme


class Codes(LatticeState):
    """A quantized weight: `codes` (r, c), and the `scale`, `zero_point` and `global_scale` they go with.

    >>> import torch, recoup
    >>> model = torch.nn.Sequential(torch.nn.Linear(32, 4))
    >>> linear = recoup.prepare(model, recoup.resolve(model, "w4a16"))[0]
    >>> bool((Codes(linear).decode() == linear.weight_quantizer(linear.weight)).all())
    True
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    global_scale: Tensor | None

    @torch.no_grad()
    def __init__(self, prepared: QuantModule) -> None:
        super().__init__()
        self.spec = prepared.scheme.weights
        weight = prepared.matrix(prepared)
        self.dtype = weight.dtype
        qparams = prepared.weight_quantizer.qparams(weight)
        self.register_buffer("codes", quantize(weight, qparams, self.spec))
        self.register_buffer("scale", qparams.scale.detach().clone())
        self.register_buffer("zero_point", qparams.zero_point)
        self.register_buffer("global_scale", qparams.global_scale)

    @property
    def qparams(self) -> QParams:
        """The scales as numerics take them."""
        return QParams(scale=self.scale, zero_point=self.zero_point, global_scale=self.global_scale)

    def decode(self) -> Tensor:
        """The weight that the codes stand for, in the dtype the float weight had."""
        return dequantize(self.codes, self.qparams, self.spec).to(self.dtype)


class CodedModule(Protocol):
    """What exporters know of a converted module."""

    scheme: Scheme
    weight: Codes


class CodedLinear(nn.Module):
    """y = Q(x) decode(codes)^T + b."""

    def __init__(self, prepared: QuantLinear) -> None:
        super().__init__()
        self.scheme = prepared.scheme
        self.in_features, self.out_features = prepared.in_features, prepared.out_features
        self.weight = Codes(prepared)
        self.bias: nn.Parameter | None = prepared.bias
        self.input_quantizer: FakeQuantizer | nn.Identity = prepared.input_quantizer

    def forward(self, x: Tensor) -> Tensor:
        """The equation."""
        return F.linear(self.input_quantizer(x), self.weight.decode(), self.bias)


class CodedEmbedding(nn.Module):
    """y = decode(codes)[ids]."""

    def __init__(self, prepared: QuantEmbedding) -> None:
        super().__init__()
        self.scheme = prepared.scheme
        self.num_embeddings, self.embedding_dim = prepared.num_embeddings, prepared.embedding_dim
        self.weight = Codes(prepared)

    def forward(self, ids: Tensor) -> Tensor:
        """The equation."""
        return F.embedding(ids, self.weight.decode())


CODED_MODULES: dict[type[nn.Module], Any] = {QuantLinear: CodedLinear, QuantEmbedding: CodedEmbedding}


def is_coded(module: nn.Module) -> TypeGuard[CodedModule]:
    """A converted module."""
    return type(module) in CODED_MODULES.values()
