"""Modules that share a Parameter get one each: the same function, which rules may then treat apart.

transformers ties what a model's config says: when it is loaded, resized, or told to. So the config says no.
"""

from collections.abc import Iterator
from inspect import unwrap
from typing import Any

import torch
from torch import nn

from recoup.nn import Codes, FakeQuantizer, shared_parameters


@torch.no_grad()
def untie(model: nn.Module) -> nn.Module:
    """Give every module that shares a Parameter one of its own; in place, returns the model.

    The first module that holds a Parameter keeps it, the others get the same values; an optimizer made
    earlier does not know theirs. In a model of transformers `tie_word_embeddings` becomes False, in its
    config and those inside: then `save_pretrained` writes every tensor, `from_pretrained` loads it, and
    neither `tie_weights` nor `resize_token_embeddings` ties again. One key says it of all, so all are untied,
    or none. `model.recoup_untied` remembers what was tied to what, for `explain`.
    Never changes what the model computes; a module that runs at several places stays one.

    Args:
        model: float.

    Raises:
        ValueError: nothing is tied; a prepared model; one that is tied again whatever its config says, or
            whose forward asks its config. The model is then as it was.

    >>> model = nn.Sequential(nn.Embedding(16, 32), nn.Linear(32, 16, bias=False))
    >>> model[1].weight = model[0].weight
    >>> untie(model).recoup_untied, model[1].weight is model[0].weight
    ({'1.weight': '0.weight'}, False)
    """
    if any(isinstance(module, (FakeQuantizer, Codes)) for module in model.modules()):
        raise ValueError("untie: the model is prepared already; untie the float model, before resolve")
    shared = shared_parameters(model)
    if not shared:
        raise ValueError("untie: no two modules share a Parameter, nothing is tied; leave untie out")
    tying: list[Any] = [module for module in model.modules() if hasattr(module, "all_tied_weights_keys")]
    own = [_own(model, path) for _, *others in shared for path in others]
    said = [(config, "tie_word_embeddings", False) for it in tying for config in _saying_tie(it.config)]
    before = _set([*own, *said, *((module, "all_tied_weights_keys", {}) for module in tying)])
    if why := _obstacle(model, tying):
        _set(before)
        first, other, *_ = shared[0]
        raise ValueError(
            f"untie: {type(model).__name__} {why}; leave untie out, and give {first} and {other} one scheme, "
            "or none"
        )
    model.recoup_untied = {  # pyright: ignore[reportArgumentType]
        other: first for first, *others in shared for other in others
    }
    return model


def _set(attributes: list[tuple[Any, str, Any]]) -> list[tuple[Any, str, Any]]:
    """Set attributes of objects; what is returned sets them back."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in attributes]
    for owner, name, value in attributes:
        setattr(owner, name, value)
    return before


def _own(model: nn.Module, path: str) -> tuple[nn.Module, str, nn.Parameter]:
    """The module that holds the parameter, what it calls it, and a copy."""
    parameter, (module, _, leaf) = model.get_parameter(path), path.rpartition(".")
    copy = nn.Parameter(parameter.clone(), requires_grad=parameter.requires_grad)
    return model.get_submodule(module), leaf, copy


def _obstacle(model: nn.Module, tying: list[Any]) -> str:
    """What makes the model another one, or ties it again: on demand, or once its config was saved."""
    forwards = (getattr(unwrap(type(module).forward), "__code__", None) for module in tying)
    if any(code is not None and "tie_word_embeddings" in code.co_names for code in forwards):
        return "computes something else where tie_word_embeddings is False"
    for module in tying:
        module.tie_weights()
    saved = [type(module.config).from_dict(module.config.to_dict()) for module in tying]
    if shared_parameters(model) or any(True for config in saved for _ in _saying_tie(config)):
        return "is tied whatever tie_word_embeddings says"
    return ""


def _saying_tie(config: Any) -> Iterator[Any]:
    """The configs among this one and those inside it that say to tie."""
    if getattr(config, "tie_word_embeddings", False):
        yield config
    for inside in vars(config).values():
        if hasattr(inside, "to_dict"):
            yield from _saying_tie(inside)
