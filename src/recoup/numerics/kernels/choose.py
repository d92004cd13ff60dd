"""Which implementation runs: chosen by name, once, and said."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from recoup.numerics.kernels import compiled, kept
from recoup.numerics.kernels.kept import Kept
from recoup.numerics.spec import QParams, QuantSpec

Impl = Literal["reference", "fused", "compiled"]
Choice = Literal["auto", "reference", "fused", "compiled"]
# A kernel takes seconds to make; it saves about one in a hundred passes over so many weights.
WORTH_COMPILING = 2**24


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The three operations that training needs of a quantized tensor; `kept.py` says what they do."""

    keep: Callable[[Tensor, QParams | None, QuantSpec, Kept | None], Kept]
    restore: Callable[[Kept, Tensor], Tensor]
    clip_: Callable[[Tensor, Kept], Tensor]


KERNELS: dict[str, Kernels] = {
    "fused": Kernels(keep=kept.keep, restore=kept.restore, clip_=kept.clip_),
    "compiled": Kernels(keep=compiled.keep, restore=compiled.restore, clip_=compiled.clip_),
}


def choose(asked: Choice, device: torch.device, elements: int) -> tuple[Impl, str]:
    """The implementation for so many quantized weights on a device, and why it is that one.

    Raises:
        ValueError: "compiled" is asked, and what it needs is not there; the message says what.

    >>> choose("auto", torch.device("cpu"), 1000)
    ('fused', '1,000 weights are too few to compile kernels for')
    """
    if asked not in ("auto", "reference", "fused", "compiled"):
        raise ValueError(f"impl {asked!r} asked; there are auto, reference, fused, compiled")
    if asked in ("reference", "fused"):
        return asked, "asked for"
    lacking = compiled.missing(device)
    if asked == "compiled":
        if lacking is not None:
            raise ValueError(f'impl "compiled" asked, but {lacking}; or ask for impl "fused"')
        return "compiled", "asked for"
    if elements < WORTH_COMPILING and device.type == "cpu":
        return "fused", f"{elements:,} weights are too few to compile kernels for"
    if lacking is not None:
        return "fused", lacking
    return "compiled", f"{elements:,} weights, and inductor can make kernels for {device.type}"
