"""LoRA inside of the quantizer: adapters are added, trained, and merged without moving a code."""

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, cast

import torch
from torch import nn

from recoup.nn import (
    FakeQuantizer,
    LoRA,
    QuantConv1D,
    QuantLinear,
    is_coded,
    is_prepared,
    norm_of,
    refuse_peft,
)
from recoup.schemes.parse import parse
from recoup.schemes.training import LoraSettings, TrainSettings

ALL_LINEAR = "all-linear"
Linear = QuantLinear | QuantConv1D


def add_lora(
    model: nn.Module,
    *,
    rank: int = 8,
    alpha: float = 8.0,
    targets: str | Sequence[str] = ALL_LINEAR,
    dropout: float = 0.0,
    rslora: bool = False,
) -> nn.Module:
    """Give quantized linear layers adapters, and freeze all else; in place, returns the model.

    A layer computes y = Q(x) Q(W + s B A)^T + b, so what it rounds is what `merge_lora` leaves, to the bit.
    B begins as zero and changes nothing. Learned scales stay as trainable as they are; every other Parameter
    is frozen, and stays so after merging: `model.requires_grad_()` frees them.

    Args:
        model: prepared, in float32.
        rank: of every adapter.
        alpha: the product is scaled by alpha / rank.
        targets: names of layers or the ends of these ("q_proj"), or one regular expression for the whole
            name, both as PEFT reads them; "all-linear" is every quantized linear layer, and no other.
        dropout: share of the columns of A that a forward pass in training mode leaves out. PEFT draws them
            for each token, which no weight could be.
        rslora: scale by alpha / sqrt(rank) instead.

    Raises:
        ValueError: a setting without meaning; a model that is not prepared, is PEFT's, or has adapters; a
            target that no layer has, or that is no quantized linear layer, or tied, or not float32.

    >>> import recoup
    >>> model = nn.Sequential(nn.Linear(32, 4))
    >>> recoup.add_lora(recoup.prepare(model, recoup.resolve(model, "w4a16")), rank=2)[0].lora
    LoRA(rank=2, scaling=4)
    """
    given = {"rank": rank, "alpha": alpha, "targets": targets, "dropout": dropout, "rslora": rslora}
    settings = parse(LoraSettings, given, "lora")
    for module in check_lora(model, settings).values():
        module.lora = LoRA(settings, _matrix(module)).train(module.training)
    _freeze_all_but(model, LoRA, FakeQuantizer)
    return model


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """W := W + s B A in every layer with an adapter, which is gone then; in place, returns the model.

    Codes, and what the model computes, stay the same to the bit, on the device and with the settings of
    matrix products that it was trained with.

    Raises:
        ValueError: the model has no adapters.
    """
    for module in adapted(model).values():
        weight = module.weight.T if isinstance(module, QuantConv1D) else module.weight
        weight.copy_(_matrix(module))
        _drop(module)
    return model


def adapted(model: nn.Module) -> dict[str, Linear]:
    """The layers with an adapter, by name.

    Raises:
        ValueError: there is none.
    """
    found = _adapted(model)
    if not found:
        raise ValueError("the model has no adapters; give it some with recoup.add_lora(model, rank=16)")
    return found


def check_lora(model: nn.Module, settings: LoraSettings) -> dict[str, Linear]:
    """The layers of a prepared model that get adapters, by name. Changes nothing.

    Raises:
        ValueError: see `add_lora`.
    """
    refuse_peft(model)
    layers = {name: module for name, module in model.named_modules() if is_prepared(module)}
    if not layers:
        state = "converted" if any(map(is_coded, model.modules())) else "not prepared"
        raise ValueError(f"lora: the model is {state}; adapters go between recoup.prepare and recoup.convert")
    if _adapted(model):
        raise ValueError("lora: the model has adapters; merge them first, with recoup.merge_lora(model)")
    kept = next((name for name, module in layers.items() if norm_of(cast(Any, module)) is not None), None)
    if kept is not None:
        raise ValueError(
            f"lora: {kept} has its norm inside, which an adapter's frozen layer would not train; "
            "merge it first, with recoup.merge_batch_norm(model)"
        )
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    chosen: dict[str, Linear] = {}
    for name, module in _targeted(model, settings).items():
        if not isinstance(module, Linear):
            raise ValueError(
                f"{name}: an adapter asked of a {type(module).__name__}, which is no quantized linear layer; "
                "leave it out of targets, or quantize it by a rule"
            )
        others = [other for other in holders[id(module.weight)] if other != name]
        if others:
            raise ValueError(
                f"{name}: an adapter asked, but its weight is that of {others[0]} too, which would not have "
                "it; leave it out of targets"
            )
        if module.weight.dtype != torch.float32:
            raise ValueError(
                f"{name}: an adapter asked of a weight in {module.weight.dtype}, which could not hold the "
                "merged one; call model.float() before recoup.prepare"
            )
        chosen[name] = module
    return chosen


def check_scales(model: nn.Module, key: str) -> None:
    """A prepared model with learned ranges, which a key of the recipe is about.

    Raises:
        ValueError: no range is learned.
    """
    if not any(
        module.spec.ranges == "learned" for module in model.modules() if isinstance(module, FakeQuantizer)
    ):
        raise ValueError(f"train.{key} asked, but no range is learned; set weight_ranges: learned")


@contextmanager
def trained_parameters(model: nn.Module, settings: TrainSettings) -> Generator[None]:
    """Inside, what `settings` names is trainable and no more; afterwards all is as trainable as before.

    Adapters are merged at the end. After an error they are dropped, and the weights are as they were.

    Raises:
        ValueError: see `add_lora`; there is nothing to train, or no range to freeze.
    """
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    if settings.freeze_ranges is not None:
        check_scales(model, "freeze_ranges")
    if settings.lora is not None:
        add_lora(model, **dict(settings.lora))
    elif settings.parameters == "scales":
        check_scales(model, "parameters: scales")
        _freeze_all_but(model, FakeQuantizer)
    elif not any(trainable.values()):
        raise ValueError("nothing to train: every parameter is frozen; call model.requires_grad_() first")
    try:
        yield
        if settings.lora is not None:
            merge_lora(model)
    finally:
        for module in _adapted(model).values() if settings.lora is not None else ():
            _drop(module)
        for parameter, flag in trainable.items():
            parameter.requires_grad_(flag)


def _targeted(model: nn.Module, settings: LoraSettings) -> dict[str, nn.Module]:
    """What `targets` names, of all that a float model has, too."""
    twins = {name: module for name, module in model.named_modules() if is_prepared(module)}
    linear = {name: module for name, module in twins.items() if isinstance(module, Linear)}
    if settings.targets == ALL_LINEAR:
        return dict(linear)
    names = {
        name: module
        for name, module in model.named_modules()
        if name and not any(name.startswith(f"{twin}.") for twin in twins)
    }
    targets = [settings.targets] if isinstance(settings.targets, str) else settings.targets
    found: set[str] = set()
    for target in targets:
        if isinstance(settings.targets, str):
            matched = {name for name in names if re.fullmatch(target, name)}
        else:
            matched = {name for name in names if f".{name}".endswith(f".{target}")}
        if not matched:
            leaves = sorted({name.rpartition(".")[2] for name in linear})
            nearest = get_close_matches(target, [*leaves, ALL_LINEAR], n=3, cutoff=0.3) or leaves[:3]
            raise ValueError(
                f"lora.targets: {target!r} matches no module; did you mean {', '.join(nearest)}?"
            )
        found |= matched
    return {name: module for name, module in names.items() if name in found}


def _adapted(model: nn.Module) -> dict[str, Linear]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    return {name: module for name, module in layers.items() if module.lora is not None}


def _freeze_all_but(model: nn.Module, *kinds: type[nn.Module]) -> None:
    """Parameters of modules of these kinds stay as trainable as they are."""
    of_kind = (module for module in model.modules() if isinstance(module, kinds))
    kept = {parameter for module in of_kind for parameter in module.parameters()}
    for parameter in model.parameters():
        if parameter not in kept:
            parameter.requires_grad_(False)


def _drop(module: Linear) -> None:
    del module.lora
    module.lora = None


def _matrix(module: Linear) -> torch.Tensor:
    return module.matrix(cast(Any, module))
