"""Norms of quantized layers in training: inside of the quantizers, then merged without moving a code."""

import copy
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from recoup.nn import (
    Batch,
    attach,
    call,
    device_of,
    evaluating,
    folded_norm,
    is_coded,
    is_prepared,
    merge,
    moved,
    norm_of,
)
from recoup.numerics import FLOAT32, QuantSpec


def add_batch_norm(model: nn.Module) -> nn.Module:
    """Give quantized layers back the norms that `fuse` folded into them; in place, returns the model.

    In training mode such a layer computes with Q(k W), as it will ship, and a batch is normalised by its own
    statistics; `layer.batch_norm.eval()` freezes them. In evaluation mode no output changes by a bit. Layers
    that stay in float stay folded.

    Args:
        model: float when `recoup.transforms.fuse` saw it, then prepared.

    Raises:
        ValueError: the model is not prepared, has norms inside or adapters, or no norm was folded.

    >>> import recoup
    >>> from recoup.transforms import fuse
    >>> model, x = nn.Sequential(nn.Linear(32, 4), nn.BatchNorm1d(4)).eval(), torch.ones(2, 32)
    >>> recoup.ptq(fuse(model, x), "w4a16", [x], observer="minmax")[0].bias.requires_grad
    True
    >>> type(recoup.add_batch_norm(model)[0].batch_norm)
    <class 'torch.nn.modules.batchnorm.BatchNorm1d'>
    """
    for module in check_batch_norm(model).values():
        attach(module)
    return model


def merge_batch_norm(model: nn.Module) -> nn.Module:
    """W := k W, b := k b + (beta - k mean) in every layer with a norm inside; in place, returns the model.

    Codes, and what the model computes in evaluation mode, stay the same to the bit.

    Raises:
        ValueError: no layer has a norm inside.
    """
    layers = normed(model)
    if not layers:
        raise ValueError(
            "the model has no norms inside of its layers; give it some with recoup.add_batch_norm"
        )
    for module in layers.values():
        merge(module)
    return model


def normed(model: nn.Module) -> dict[str, Any]:
    """The layers with a norm inside, by name."""
    return {name: module for name, module in model.named_modules() if norm_of(module) is not None}


def check_batch_norm(model: nn.Module) -> dict[str, Any]:
    """The layers of a prepared model that get their norms back, by name. Changes nothing.

    Raises:
        ValueError: see `add_batch_norm`.
    """
    layers = {name: module for name, module in model.named_modules() if is_prepared(module)}
    if not layers:
        state = "converted" if any(map(is_coded, model.modules())) else "not prepared"
        raise ValueError(
            f"batch_norm: the model is {state}; norms go into layers between recoup.prepare and "
            "recoup.convert"
        )
    if normed(model):
        raise ValueError(
            "batch_norm: the model has norms inside of its layers; merge them first, with "
            "recoup.merge_batch_norm(model)"
        )
    adapted = next(
        (name for name, module in layers.items() if getattr(module, "lora", None) is not None), None
    )
    if adapted is not None:
        raise ValueError(
            f"batch_norm: {adapted} has an adapter, whose layer is frozen with its norm; merge it "
            "first, with recoup.merge_lora(model)"
        )
    found = {name: module for name, module in layers.items() if folded_norm(cast(Any, module)) is not None}
    if not found:
        raise ValueError(
            "batch_norm: no norm was folded into a quantized layer; call recoup.transforms.fuse(model, "
            "batch) before recoup.prepare, or leave batch_norm out"
        )
    return found


@contextmanager
def kept_norms(model: nn.Module, *, kept: bool) -> Generator[None]:
    """Inside, layers have their norms, where they are to be kept; merged at the end, also after an error.

    Raises:
        ValueError: see `add_batch_norm`.
    """
    if kept:
        add_batch_norm(model)
    try:
        yield
    finally:
        if kept:
            merge_batch_norm(model)


@torch.no_grad()
def reestimate(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Take the running statistics of all norms from these batches; in place.

    They are the means over the batches of mean and unbiased variance, as torch's BatchNorm with momentum=None
    has them (Nagel et al. 2022, arXiv:2203.11086, section 4.3). Codes stay: where every output channel has
    scales of its own, in float32, these follow k, and only a weight within rounding of the border of two
    codes may get the other; elsewhere the variance stays, and the mean alone is new.

    Args:
        model: prepared, with norms inside of its layers.
        batches: of training; each as large as those that were trained on.
    """
    layers = list(normed(model).values())
    found = [_Sums() for _ in layers]
    for batch in batches:
        with evaluating(model), _statistics_stay(layers), ExitStack() as hooks:
            for module, sums in zip(layers, found, strict=True):
                module.batch_norm.train()
                hooks.callback(module.batch_norm.register_forward_pre_hook(sums.add).remove)
            call(model, moved(batch, device_of(model)))
    for module, sums in zip(layers, found, strict=True):
        _set(module, *sums.means)


@contextmanager
def _statistics_stay(layers: list[Any]) -> Generator[None]:
    """Afterwards they are what they were, so that k is that of the codes."""
    before = [copy.deepcopy(module.batch_norm.state_dict()) for module in layers]
    try:
        yield
    finally:
        for module, state in zip(layers, before, strict=True):
            module.batch_norm.load_state_dict(state)


class _Sums:
    """Of the statistics of batches, in float64."""

    def __init__(self) -> None:
        self.batches, self.mean, self.variance = 0, torch.zeros(()), torch.zeros(())

    def add(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        del norm
        variance, mean = torch.var_mean(inputs[0].double(), dim=[0, *range(2, inputs[0].ndim)])
        self.batches += 1
        self.mean, self.variance = self.mean.to(mean) + mean, self.variance.to(mean) + variance

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        return self.mean / self.batches, self.variance / self.batches


def _set(module: Any, mean: Tensor, variance: Tensor) -> None:
    norm, quantizer = module.batch_norm, module.weight_quantizer
    norm.running_mean.copy_(mean)
    if not _follows(quantizer.spec):
        return
    before = (norm.running_var + norm.eps).sqrt()
    norm.running_var.copy_(variance)
    quantizer.stretch(before / (norm.running_var + norm.eps).sqrt())


def _follows(spec: QuantSpec) -> bool:
    """A factor for each output channel goes into the scales, and no code moves."""
    return spec.granularity.rows == 1 and spec.scale_format == FLOAT32 and not spec.global_scale
