"""Layers whose weight a module around them reads and computes with: their quantizer is never asked.

As Mamba's mixer does with its convolution: `self.conv1d.weight.squeeze(1)`. It is seen in the code of the
module's methods, without running them.
"""

import dis
from collections.abc import Iterator
from functools import cache
from inspect import unwrap
from types import CodeType

from torch import nn

from recoup.nn.fits import type_name
from recoup.nn.modules import quant_type

# What may be asked of a weight without computing with it.
_ABOUT = frozenset({"dtype", "device", "shape", "size", "ndim", "numel", "is_cuda", "requires_grad"})
# Methods that run before or beside inference.
_BESIDE = frozenset({"__init__", "_init_weights", "init_weights", "reset_parameters", "tie_weights"})


def unasked_layers(model: nn.Module) -> dict[str, str]:
    """The names of such layers, and the type of the module that reads their weight.

    torch's own modules are not among these readers; `check_surroundings` knows them. A subclass of
    nn.MultiheadAttention is, which hands the weight of `out_proj` to a function.
    """
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        paths = set(_reads(type(module)))
        if isinstance(module, nn.MultiheadAttention) and quant_type(module) is None:
            paths.add("out_proj")
        for path in paths:
            if path in dict(module.named_modules()):
                found[f"{name}.{path}".lstrip(".")] = type_name(module)
    return found


@cache
def _reads(kind: type[nn.Module]) -> frozenset[str]:
    """The attributes of `self`, with dots, whose weight this type's methods compute with, and never ask."""
    functions = (
        unwrap(method)
        for parent in kind.__mro__
        if not parent.__module__.startswith("torch.")
        for name, method in vars(parent).items()
        if name not in _BESIDE and callable(method)
    )
    found = (getattr(function, "__code__", None) for function in functions)
    chains = {chain for code in found if isinstance(code, CodeType) for chain in _chains(code)}
    read = {chain[: chain.index("weight")] for chain in chains if _computes(chain)}
    return frozenset(".".join(path) for path in read - chains)


def _computes(chain: tuple[str, ...]) -> bool:
    """`a.weight`, or `a.weight.squeeze`, and not `a.weight.dtype`."""
    return "weight" in chain[1:] and not _ABOUT.intersection(chain[-1:])


def _chains(code: CodeType) -> Iterator[tuple[str, ...]]:
    """What is read of `self`: ("conv1d", "weight") for `self.conv1d.weight`."""
    chain: list[str] | None = None
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            if chain is not None:
                chain.append(instruction.argval)
            continue
        if chain:
            yield tuple(chain)
        chain = [] if instruction.argval == "self" else None
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _chains(constant)
