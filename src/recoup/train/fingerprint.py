"""Which tensors these are: a checksum of their values, shapes and names."""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def fingerprint(values: object) -> str:
    """sha256 of a tensor, or of what mappings and sequences of tensors and plain values hold, in order.

    >>> fingerprint({"x": torch.zeros(2)}) == fingerprint({"x": torch.zeros(2)})
    True
    >>> fingerprint({"x": torch.zeros(2)}) == fingerprint({"x": torch.zeros(2, 1)})
    False
    """
    digest = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            for name, entry in value.items():  # pyright: ignore[reportUnknownVariableType]
                digest.update(str(name).encode())
                add(entry)
        elif isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
            for entry in value:  # pyright: ignore[reportUnknownVariableType]
                add(entry)
        else:
            digest.update(repr(value).encode())

    add(values)
    return digest.hexdigest()
