"""The codes of weights are drawn where gradients are made, and nowhere else; see `numerics.drawn`.

One seed serves a whole optimizer step, so its micro-batches, activations that are computed again and the
backward pass see the same codes. Whatever runs between two passes rounds to nearest: looks at held-out
batches, records, conversion.
"""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn

from recoup.nn import FakeQuantizer


@contextmanager
def codes_drawn(model: nn.Module, seed: int | None) -> Generator[None]:
    """Inside, the code of every quantized weight is drawn; afterwards all are the nearest again.

    Args:
        model: prepared.
        seed: of `seed_of_step`; None leaves all codes the nearest.
    """
    weights = [module for module in model.modules() if isinstance(module, FakeQuantizer) and module.is_weight]
    try:
        for index, quantizer in enumerate(weights):
            quantizer.seed = None if seed is None else seed + index
        yield
    finally:
        for quantizer in weights:
            quantizer.seed = None


def seed_of_step() -> int:
    """From torch's own generator, whose state checkpoints hold; the same in all processes."""
    from accelerate.utils import broadcast_object_list

    (seed,) = broadcast_object_list([int(torch.randint(2**62, ()))])
    return seed
