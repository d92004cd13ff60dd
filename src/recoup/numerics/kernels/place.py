"""Memory for values that one operation needs, and nobody after it."""

import threading
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

_held = threading.local()


def place(name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized tensor. On a CPU, the next place of that name is the same memory.

    So it lies in the cache, and the system need not find and clear pages for it: in a training step that
    takes longer than what is done with them. Elsewhere torch's allocator sees to that.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    held, slot, count = vars(_held), f"{name} {dtype}", torch.Size(shape).numel()
    if slot not in held or held[slot].numel() < count:
        with torch.inference_mode(False):  # or it could never be written to outside of it
            held[slot] = torch.empty(count, dtype=dtype, device=device)
    return cast(Tensor, held[slot][:count].view(shape))
