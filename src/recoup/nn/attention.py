"""The twin of nn.MultiheadAttention: its projections on their lattices, and attention between them as ever.

torch's own forward asks none of its layers: one function takes their weights. The twin computes what four
Linears around attention would, the last of which is the child `out_proj`, a quantized module of its own.
"""

from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recoup.nn.fake_quantizer import FakeQuantizer
from recoup.nn.twin import Inputs, Weight, adopt, input_quantizer, stack_quantizer
from recoup.schemes import Scheme


class Attention(nn.MultiheadAttention):
    """y = out_proj(the heads' softmax(q k^T / sqrt(d) + mask) v), where q, k and v are W x + b.

    Attributes are torch's, but that `_qkv_same_embed_dim` is False: so nn.TransformerEncoderLayer asks its
    layers, where it would hand the float weights of all of them to one kernel.
    """

    scheme: Scheme
    query_quantizer: FakeQuantizer | nn.Identity
    key_quantizer: FakeQuantizer | nn.Identity
    value_quantizer: FakeQuantizer | nn.Identity

    def rounded(self, name: str) -> Tensor:
        """The weight of this name on its lattice."""
        raise NotImplementedError

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The equation, with torch's arguments and results.

        Raises:
            ValueError: the hint comes without the mask that it speaks of, or inputs are nested tensors.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal says that attn_mask is causal, and there is no attn_mask; give both")
        if query.is_nested:
            raise ValueError(
                "nested tensors have no quantized attention; build nn.TransformerEncoder with "
                "enable_nested_tensor=False"
            )
        batched, sequence = query.ndim == 3, 1 if self.batch_first or query.ndim == 2 else 0
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif sequence == 0:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._projected(query, key, value)
        is_causal = is_causal and key_padding_mask is None and not need_weights  # else the mask decides
        mask = None if is_causal else self._mask(attn_mask, key_padding_mask, q.dtype)
        k, v, mask = self._extended(k, v, mask)
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        dropout, weights = self.dropout if self.training else 0.0, None
        if need_weights:
            scores = q * self.head_dim**-0.5 @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            y = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if not batched:
            return y[0], None if weights is None else weights[0]
        return y if sequence == 1 else y.transpose(0, 1), weights

    def _projected(self, *inputs: Tensor) -> list[Tensor]:
        """q, k and v of (batch, places, features)."""
        names = _names(self)
        weights = [self.rounded(name) for name in names] if len(names) == 3 else self.rounded(*names).chunk(3)
        bias = cast(Tensor | None, self.in_proj_bias)
        biases = [None] * 3 if bias is None else bias.chunk(3)
        quantizers = self.query_quantizer, self.key_quantizer, self.value_quantizer
        return [
            F.linear(of_x(x), weight, bias)
            for of_x, x, weight, bias in zip(quantizers, inputs, weights, biases, strict=True)
        ]

    def _mask(self, places: Tensor | None, keys: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores, (batch, heads, queries, keys) or what broadcasts to it."""
        masks: list[Tensor] = []
        if places is not None:
            places = _added(places, dtype)
            masks += [places if places.ndim == 2 else places.unflatten(0, (-1, self.num_heads))]
        if keys is not None:
            masks += [_added(keys, dtype)[:, None, None]]
        return sum(masks[1:], masks[0]) if masks else None

    def _extended(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """With `add_bias_kv` and `add_zero_attn`, a key and a value more that everybody sees."""
        more: list[tuple[Tensor, Tensor]] = []
        if self.bias_k is not None and self.bias_v is not None:
            more += [(self.bias_k, self.bias_v)]
        if self.add_zero_attn:
            more += [(k.new_zeros(1, 1, self.embed_dim), v.new_zeros(1, 1, self.embed_dim))]
        for key, value in more:
            k = torch.cat([k, key.expand(len(k), -1, -1)], dim=1)
            v = torch.cat([v, value.expand(len(v), -1, -1)], dim=1)
            mask = None if mask is None else F.pad(mask, (0, 1))
        return k, v, mask


class QuantMultiheadAttention(Attention):
    """The equation with Q(W) and Q(x); queries, keys and values have ranges of their own."""

    inputs_are: ClassVar[Inputs] = "tokens"

    @classmethod
    def from_float(cls, module: nn.MultiheadAttention, scheme: Scheme, path: str) -> Self:
        """The twin of a float module; it shares every Parameter. See `QuantLinear.from_float`."""
        twin = adopt(cls, module, path)
        twin.scheme, twin._qkv_same_embed_dim = scheme, False
        for name in cls.names(module):
            weight = cls.view(module, name)
            twin.add_module(f"{name}_quantizer", stack_quantizer(weight, scheme, f"{path}.{name}"))
        features = {"query": module.embed_dim, "key": module.kdim, "value": module.vdim}
        device = cls.view(module, cls.names(module)[0]).matrix.device
        for name, width in features.items():
            twin.add_module(f"{name}_quantizer", input_quantizer(width, scheme, f"{path}.{name}", device))
        return twin

    @staticmethod
    def names(module: nn.MultiheadAttention) -> tuple[str, ...]:
        """Of the three projections in one, or of each."""
        return _names(module)

    @staticmethod
    def view(module: nn.MultiheadAttention, name: str) -> Weight:
        """The projections, one below the other."""
        return Weight(matrix=getattr(module, name), rows=module.embed_dim)

    @staticmethod
    def check(module: nn.MultiheadAttention, scheme: Scheme, path: str) -> None:
        """Can it have this scheme?

        Raises:
            ValueError: its biases would be integers.
        """
        if scheme.integer_bias:
            raise ValueError(
                f"{path}: {scheme.name!r} has biases in steps of the products, and those of a "
                f"{type(module).__name__} are floats; use w8a8-ort-static"
            )

    def rounded(self, name: str) -> Tensor:
        """The weight of this name on its lattice."""
        quantizer: FakeQuantizer = getattr(self, f"{name}_quantizer")
        return quantizer(getattr(self, name))


def _names(module: Any) -> tuple[str, ...]:
    packed = module.in_proj_weight is not None
    return ("in_proj_weight",) if packed else ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of booleans, true where nobody may look, as what is added to scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
