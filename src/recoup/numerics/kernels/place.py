"""Memory for values that one operation needs, and nobody after it."""

import threading

import torch
from torch import Tensor

# By name and dtype: the memory, and views of it by shape.
_Held = dict[tuple[str, torch.dtype], tuple[Tensor, dict[torch.Size, Tensor]]]


class _Places(threading.local):
    def __init__(self) -> None:
        self.held: _Held = {}


_places = _Places()


def place(name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized tensor. On a CPU, the next place of that name is the same memory.

    So it lies in the cache, and the system need not find and clear pages for it: in a training step that
    takes longer than what is done with them. Elsewhere torch's allocator sees to that.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    held = _places.held.get((name, dtype))
    if held is not None and (view := held[1].get(shape)) is not None:
        return view
    count = shape.numel()
    with torch.inference_mode(False):  # or it could never be written to outside of it
        if held is None or held[0].numel() < count:
            held = _places.held[name, dtype] = torch.empty(count, dtype=dtype, device=device), {}
        view = held[1][shape] = held[0][:count].view(shape)
    return view
