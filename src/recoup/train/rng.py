"""The state of every random number generator that a training step may draw from."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def rng_state(device: torch.device) -> dict[str, Any]:
    """Of Python, NumPy, PyTorch and the device, as plain data."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    found = {
        "python": [version, list(numbers), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": _written(torch.get_rng_state()),
    }
    return found if device.type == "cpu" else found | {device.type: _written(_module(device).get_rng_state())}


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Go on where `rng_state` was asked."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_read(state["torch"]))
    if device.type != "cpu":
        _module(device).set_rng_state(_read(state[device.type]))


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)


def _written(state: Tensor) -> str:
    return state.cpu().numpy().tobytes().hex()


def _read(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
