"""Bias correction: what rounding adds to a layer's outputs on average, the bias takes off again.

A rounded or clipped weight moves the mean of every output channel, and so do clipped inputs; the layers that
follow see inputs with another mean than float ones have. This part of the error is a constant, and the layer
has one to give: no code, no scale and nothing in an engine changes (Nagel et al. 2019, arXiv:1906.04721,
section 4.2; measured on data, as in its appendix D).

The layers are taken as one forward pass over all the data reaches them, so that each corrects what the
corrected layers before it leave.
"""

import logging
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from recoup.calibrate.as_one import as_one, check_batches, check_ready
from recoup.nn import (
    Batch,
    FakeQuantizer,
    call,
    device_of,
    evaluating,
    is_prepared,
    moved,
    norm_of,
    quantization_off,
    quantizers_of,
    take,
    without_labels,
)

_log = logging.getLogger(__name__)
SAMPLES = 128  # a mean over positions and samples needs no more, and they go through the model at once


@torch.no_grad()
def correct_biases(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    teacher: nn.Module | None = None,
    samples: int | None = None,
) -> nn.Module:
    """Give output channels of layers with a bias the mean they have in float; in place, returns the model.

    Linear layers and convolutions take part; not those without a bias, those whose bias another module
    shares, and those that a pass runs more than once.
    The float model is lost: copy a teacher before.

    Args:
        model: prepared and calibrated.
        batches: all of one shape; they go through the model as one.
        teacher: the float model, with modules of the same names; None asks the model itself with
            quantization off, which is another one after GPTQ.
        samples: how many to see, and so many must be there; up to 128 where it is None.

    Raises:
        ValueError: the model is not prepared or not calibrated, or has no bias to correct, or none that a
            pass uses once; a norm is kept inside of its quantizers; no batches, fewer samples than asked, or
            batches of several shapes.

    >>> from recoup import calibrate, prepare, resolve
    >>> model, x = nn.Sequential(nn.Linear(64, 32)), torch.rand(256, 64)
    >>> y = model(x)
    >>> rounded = calibrate(prepare(model, resolve(model, "w2a16")), [x])
    >>> before = (rounded(x) - y).mean(dim=0).abs().max()
    >>> bool((correct_biases(rounded, [x])(x) - y).mean(dim=0).abs().max() < before / 1000)
    True
    """
    check_biases(model)
    taken = [without_labels(batch) for batch in take(batches, samples or SAMPLES)]
    check_batches(taken, "bias")
    check_ready(model, taken, samples, "bias", "correct_biases")
    batch = moved(as_one(taken), device_of(model))
    layers, unrounded = _layers(model), model if teacher is None else teacher
    means: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers.values()}
    with evaluating(unrounded), quantization_off(unrounded), ExitStack() as hooks:
        for name, layer in layers.items():

            def remember(of: nn.Module, _: Any, y: Tensor, found: list[Tensor] = means[layer]) -> None:
                found.append(_mean(of, y))

            hooks.callback(unrounded.get_submodule(name).register_forward_hook(remember).remove)
        call(unrounded, batch)

    def correct(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], y: Tensor) -> Tensor:
        (mean,) = means.pop(layer, (None,))
        if mean is None:  # it is run below, corrected
            return y
        bias = layer.get_parameter("bias")
        corrected = (bias - (_mean(layer, y) - mean)).to(bias.dtype)
        if bias.requires_grad:
            bias.copy_(corrected)
        else:  # a teacher may share what is frozen
            layer.register_parameter("bias", nn.Parameter(corrected, requires_grad=False))
        return layer(*arguments, **named)

    for layer in [layer for layer, found in means.items() if len(found) != 1]:
        _log.info("bias: %s stays as it is: a pass runs it %d times", _path(layer), len(means.pop(layer)))
    if not means:
        raise ValueError("bias: a pass runs no layer with a bias exactly once; leave it out")
    with evaluating(model), ExitStack() as hooks:
        for layer in means:
            hooks.callback(layer.register_forward_hook(correct, with_kwargs=True).remove)
        call(model, batch)
    return model


def check_biases(model: nn.Module) -> None:
    """Has a prepared model a bias to correct?

    Raises:
        ValueError: it has not; says why.
    """
    if not any(isinstance(module, FakeQuantizer) for module in model.modules()):
        raise ValueError("bias: the model is not prepared; run recoup.prepare and recoup.calibrate first")
    layers = _layers(model)
    if not layers:
        raise ValueError(
            "bias: no linear layer or convolution that the plan quantizes has a bias of its own; leave it out"
        )
    for layer in layers.values():
        if norm_of(layer) is not None:
            raise ValueError(
                f"{_path(layer)}: a norm stands between it and its bias; call recoup.merge_batch_norm first"
            )


def _layers(model: nn.Module) -> dict[str, Any]:
    """Linear layers and convolutions with a bias that no other module holds, by name."""
    parameters = (parameter for m in model.modules() for parameter in m.parameters(recurse=False))
    holders: Counter[Any] = Counter(parameters)
    return {
        name: module
        for name, module in model.named_modules()
        if is_prepared(module)
        and module.inputs_are in ("tokens", "channels")
        and holders[getattr(module, "bias", None)] == 1
    }


def _path(layer: Any) -> str:
    return next(iter(quantizers_of(layer).values())).path.removesuffix(".weight")


def _mean(layer: Any, y: Tensor) -> Float[Tensor, " channels"]:
    """Over everything but the channels, which lie before as many axes as the layer's kernel has."""
    channels = y.ndim - 1 - len(getattr(layer, "kernel_size", ()))
    return y.double().mean(dim=[axis for axis in range(y.ndim) if axis != channels])
