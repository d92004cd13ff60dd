"""Activation checkpointing: a layer keeps its input only, and computes the rest again for the gradient."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def activations_recomputed(model: nn.Module) -> Generator[None]:
    """Inside, the layers of a transformers model keep their inputs only; afterwards all is as it was.

    Losses and gradients are the same to the bit. transformers checkpoints a layer that is in training mode,
    so these layers are, and nothing inside them is put there: no dropout wakes up.

    Raises:
        ValueError: the model has no such layers, or a layer drops activations by itself.
    """
    layers = _layers(model)
    modes = {layer: layer.training for layer in layers}
    for layer in layers:
        if not layer.training:
            _check_quiet(layer)
    flags = {m: m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing")}
    asked: Any = model
    if hasattr(model, "activation_checkpointing_enable"):  # transformers 5 renamed it on its way
        asked.activation_checkpointing_enable({"use_reentrant": False})
    else:
        asked.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        for layer in layers:
            layer.training = True
        yield
    finally:
        asked.disable_input_require_grads()
        for module, flag in flags.items():
            module.gradient_checkpointing = flag
        for layer, mode in modes.items():
            layer.training = mode


def check_layers(model: nn.Module, *, quiet: bool) -> None:
    """Has the model layers that can be checkpointed?

    Args:
        model: of transformers.
        quiet: nothing may drop activations, since a teacher is followed.

    Raises:
        ValueError: it has none, or one drops activations by itself.
    """
    for layer in _layers(model):
        if quiet:
            _check_quiet(layer)


def _layers(model: nn.Module) -> list[nn.Module]:
    if getattr(model, "supports_gradient_checkpointing", False):  # so transformers is imported already
        from transformers.modeling_layers import GradientCheckpointingLayer

        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if layers:
            return list(layers)
    raise ValueError(
        f"activation_checkpointing: {type(model).__name__} has no layers that transformers can checkpoint; "
        "turn it off, and make the batches smaller (accumulate makes up for it)"
    )


def _check_quiet(layer: nn.Module) -> None:
    own = {name: value for name, value in vars(layer).items() if "drop" in name and isinstance(value, float)}
    loud = [name for name, value in own.items() if value > 0]
    if loud:
        raise ValueError(
            f"activation_checkpointing: {type(layer).__name__} would drop activations ({loud[0]}) while it "
            "follows a teacher; set the model's dropout to 0, or turn activation_checkpointing off"
        )
