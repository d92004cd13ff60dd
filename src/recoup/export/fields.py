"""Codes that lie in wider fields than they need: the file is what was trained, and larger than its bits."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from recoup.numerics import IntFormat
from recoup.schemes import Scheme
from recoup.validate.report import size


def too_wide(model: nn.Module, widths: Mapping[str, tuple[Scheme, int]]) -> list[str]:
    """A line for every number of bits whose codes lie in wider fields, with what that costs.

    Args:
        model: float.
        widths: the scheme of every quantized module, and the bits that a code of its weight takes.

    >>> import torch
    >>> from recoup.schemes import preset
    >>> too_wide(torch.nn.Sequential(torch.nn.Linear(512, 256)), {"0": (preset("w3a16"), 4)})
    ['codes of 3 bits lie in fields of 4 (0): 16.4 kB more than their bits; 4 bits would take no more']
    """
    found: dict[tuple[int, int], dict[str, Tensor]] = defaultdict(dict)
    for path, (scheme, width) in widths.items():
        weight = model.get_submodule(path).weight
        assert isinstance(weight, Tensor)
        if width > scheme.weights.format.bits:
            found[scheme.weights.format.bits, width][path] = weight
    lines: list[str] = []
    for (bits, width), weights in found.items():
        first, *others = weights
        where = f"{first} and {len(others)} more" if others else first
        wasted = size(sum(weight.numel() for weight in set(weights.values())) * (width - bits) / 8)
        lines.append(
            f"codes of {bits} bits lie in fields of {width} ({where}): {wasted} more than their bits; "
            f"{width} bits would take no more"
        )
    return lines


def filled(scheme: Scheme, width: int) -> Scheme:
    """The same with codes that fill their fields; of formats other than integers, the scheme itself."""
    grid = scheme.weights.format
    if not isinstance(grid, IntFormat):
        return scheme
    return replace(scheme, weights=replace(scheme.weights, format=replace(grid, bits=width)))
