"""Calibration: from data, without labels, to the ranges of every quantizer that needs them."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from recoup.calibrate.observers import OBSERVERS, MinMax, Observer
from recoup.nn import (
    DEFAULT_SAMPLES,
    Batch,
    FakeQuantizer,
    QuantModule,
    call,
    device_of,
    evaluating,
    is_prepared,
    make_room,
    moved,
    quantization_off,
    quantizers_of,
    size_of,
    take,
    weight_of,
    without_labels,
)
from recoup.numerics import QuantSpec, per_tensor
from recoup.progress import watched


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    observer: str = "minmax",
    samples: int | None = None,
) -> nn.Module:
    """Set the range of every static and learned quantizer; in place, returns the model.

    Weights are observed as they are, but where their scale rule looks at the values itself (mean,
    four-over-six), which no observer changes. Inputs are observed while the model runs on the batches, in
    float and in evaluation mode; when every input range is dynamic, only the first batch is looked at, to
    keep as the example input that exporters trace (`model.recoup_example`). Never changes a weight and never
    needs labels.

    Args:
        model: prepared.
        batches: mappings (keyword arguments), tuples (positional ones) or tensors.
        observer: how a range follows from what is seen: "minmax", "moving-average" over the batches,
            "percentile" (99.99 %), "kl" (TensorRT's entropy; weights in blocks by min and max) or "mse" (the
            least squared error of every block).
        samples: how many samples to see, counted along the first axis of a batch. By default up to 512;
            a number that is asked for must be there.

    Raises:
        ValueError: the model is not prepared, no such observer, no batches, fewer samples than asked, or
            values that are not finite.
    """
    if observer not in OBSERVERS:
        raise ValueError(f"no observer {observer!r}; there are {', '.join(OBSERVERS)}")
    quantizers = {name: m for name, m in model.named_modules() if isinstance(m, FakeQuantizer)}
    if not quantizers:
        raise ValueError("nothing to calibrate: the model is not prepared; run recoup.prepare first")
    taken = list(take(batches, samples or DEFAULT_SAMPLES))
    found = sum(map(size_of, taken))
    if found < (samples or 1):
        raise ValueError(
            f"calibration: {samples or 1} samples asked, {found} found; bring more, or ask for fewer"
        )
    model.recoup_example = without_labels(taken[0])  # pyright: ignore[reportArgumentType]

    weights = {
        quantizer: (module, name)
        for module in model.modules()
        if is_prepared(module)
        for name, quantizer in quantizers_of(module).items()
    }
    observers: dict[FakeQuantizer, Observer] = {
        quantizer: _observer(observer, quantizer.spec)
        for quantizer in quantizers.values()
        if quantizer.needs_calibration
    }
    inputs = {q: o for q, o in observers.items() if q not in weights}
    if inputs:
        with quantization_off(model), evaluating(model), _watching(inputs):
            for batch in watched(taken, "calibrating"):
                call(model, moved(batch, device_of(model)))
    todo = list(observers.items())
    for quantizer, watching in watched(todo, "choosing ranges"):
        if quantizer in weights:
            module, name = weights[quantizer]
            _fit(quantizer, weight_of(type(module), module, name).matrix, watching)
            continue
        try:
            found_range = watching.range()
        except ValueError as error:
            raise ValueError(f"{quantizer.path}: {error}") from None
        quantizer.set_range(*found_range)
    for module in model.modules():
        if is_prepared(module) and module.scheme.integer_bias:
            make_room(module)
    return model


@torch.no_grad()
def calibrate_weight(module: QuantModule, name: str, observer: str) -> None:
    """Set the range of one weight's quantizer as `calibrate` does, from the weight as it is; in place.

    Args:
        module: prepared, and calibrated.
        name: of the weight's Parameter.
        observer: as `calibrate` takes it.

    Raises:
        ValueError: the weight is not finite.
    """
    quantizer = quantizers_of(module)[name]
    if quantizer.needs_calibration:
        _fit(quantizer, weight_of(type(module), module, name).matrix, _observer(observer, quantizer.spec))
    if module.scheme.integer_bias:
        make_room(module)


def _fit(quantizer: FakeQuantizer, matrix: Tensor, watching: Observer) -> None:
    if quantizer.spec.needs_values:  # a range would not say what to choose
        quantizer.fit(matrix)
        return
    watching.observe(matrix)
    quantizer.set_range(*watching.range())


def _observer(name: str, spec: QuantSpec) -> Observer:
    if spec.ranges == "dynamic":  # its only state is the global scale, and that is the tensor's extrema
        return MinMax(replace(spec, granularity=per_tensor))
    return OBSERVERS[name](spec)


@contextmanager
def _watching(observers: dict[FakeQuantizer, Observer]) -> Generator[None]:
    def observe(quantizer: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(quantizer, FakeQuantizer)
        observers[quantizer].observe(quantizer.view(arguments[0]))

    handles = [quantizer.register_forward_pre_hook(observe) for quantizer in observers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
