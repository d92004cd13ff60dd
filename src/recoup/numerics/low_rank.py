"""A weight and a product of low rank beside it: W + s B A (Hu et al. 2021, arXiv:2106.09685, section 4.1)."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class LowRank(NamedTuple):
    """s B A, in the paper's letters.

    Args:
        A: (rank, in).
        B: (out, rank).
        scaling: s.
    """

    A: Float[Tensor, "k c"]
    B: Float[Tensor, "r k"]
    scaling: float


def merged(weight: Float[Tensor, "r c"], low_rank: LowRank | None) -> Float[Tensor, "r c"]:
    """W + s B A, by one order of operations wherever it is asked for; the weight itself without a product.

    First the product, then s, then W, as PEFT merges; autocast does not reach it. Training, conversion and
    merging all call this, so they have the same bits, on one device and with one setting of its products.
    """
    if low_rank is None:
        return weight
    with torch.autocast(weight.device.type, enabled=False):
        a, b = low_rank.A, low_rank.B
        product = b @ a if weight.is_contiguous() else (a.T @ b.T).T  # lies in memory as the weight does
        return product.mul_(low_rank.scaling).add_(weight)


def gradients(
    grad: Float[Tensor, "r c"], low_rank: LowRank
) -> tuple[Float[Tensor, "k c"], Float[Tensor, "r k"]]:
    """Of A and B, from that of W + s B A: s B^T G and s G A^T."""
    grad = grad.to(low_rank.A.dtype) * low_rank.scaling
    return low_rank.B.T @ grad, grad @ low_rank.A.T
