"""What goes wrong with quantizers while a model trains, and what helps.

Two looks at a tensor, at the start and now, answer for everything that can happen to it. A new symptom is
one function, and one row of `OF_A_TENSOR` or `OF_AN_EVALUATION`. A healthy training is far from every limit
here, because a false alarm is worse than silence.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recoup.nn import FakeQuantizer
from recoup.numerics.formats import Format
from recoup.validate.looks import Look
from recoup.validate.modes import moved_by_training

_SHARE = 0.1  # of blocks or scales
_SATURATED = 0.25  # of the values, beyond twice as many as at the start: learned scales of few bits clip some
_CHANCE = 8  # so many values may well have one code
_COLLAPSED = 1 / 16  # of the scale at the start
_UNCHANGED = 1e-4  # of the codes: those that lay beside a boundary
_SLOWER = "lower train.scale_learning_rate, which is train.learning_rate where it is absent"


@dataclass(frozen=True, kw_only=True)
class Symptom:
    """What was seen, how much of it, and what helps.

    Args:
        module: or a tensor in it, by name.
        what: went wrong, in two words.
        figure: what was measured.
        remedy: what to do.
        first, last: the first and the last step after which it was seen.

    >>> print(Symptom(module="up.weight", what="few codes", figure="3 are used", remedy="lower the rate"))
    up.weight: few codes: 3 are used; lower the rate
    """

    module: str
    what: str
    figure: str
    remedy: str
    first: int = 0
    last: int = 0

    def __str__(self) -> str:
        return f"{self.module}: {self.what}: {self.figure}; {self.remedy}"


def dead(start: Look, now: Look) -> Symptom | None:
    """All codes of a weight are equal, or all codes in many blocks of values that are not."""
    del start
    blocks, given = now.values, now.position
    lost = (blocks.amin(dim=1) == blocks.amax(dim=1)) & (given.amin(dim=1) < given.amax(dim=1))
    if now.quantizer.is_weight and bool(blocks.amin() == blocks.amax()):
        figure = f"all of {blocks.numel():,} sampled codes are equal"
    elif blocks.shape[1] >= _CHANCE and float(lost.float().mean()) >= _SHARE:
        figure = f"in {int(lost.sum()):,} of {len(lost):,} sampled blocks all codes are equal"
    else:
        return None
    rest = "keep the module in float, by a rule"
    return _of(
        now, "dead", figure, f"calibrate it again, with the observer mse; or {rest}", f"{_SLOWER}; or {rest}"
    )


def collapsed(start: Look, now: Look) -> Symptom | None:
    """Many learned scales fell to a small part of what they were, to their floor, or through zero."""
    if start.scale is None or now.scale is None:
        return None
    share, floor = now.scale / start.scale, now.quantizer.spec.scale_format.floor
    on_the_floor = (now.scale.abs() <= floor) & (start.scale.abs() > floor)
    fell = ((share < _COLLAPSED) | on_the_floor) & (start.scale != 1)  # which is that of a block of zeros
    if float(fell.float().mean()) < _SHARE:
        return None
    least = float(share[fell].amin())
    figure = (
        f"{int(fell.sum()):,} of {fell.numel():,} learned scales fell, to {least:.2g} times what they were"
    )
    return _of(now, "scale collapsed", figure, _SLOWER, _SLOWER)


def saturates(start: Look, now: Look) -> Symptom | None:
    """Far more values lie beyond the grid than at the start."""
    before, after = start.saturated, now.saturated
    if after <= 2 * before + _SATURATED:
        return None
    figure = f"{after:.0%} of its values saturate, and {before:.0%} did at the start"
    return _of(now, "saturates", figure, "lower train.learning_rate, or let its range be learned", _SLOWER)


def few_codes(start: Look, now: Look) -> Symptom | None:
    """Half of the bits that its codes used are not used any more."""
    before, after = len(start.values.unique()), len(now.values.unique())
    if after > math.sqrt(before):
        return None
    figure = f"{after} of its codes are used, and {before} were at the start"
    shrunk = "its values shrank: lower train.weight_decay or train.learning_rate, or let its range be learned"
    return _of(now, "few codes", figure, shrunk, f"its scale grew: {_SLOWER}")


OF_A_TENSOR: tuple[Callable[[Look, Look], Symptom | None], ...] = (dead, collapsed, saturates, few_codes)


def of_tensors(start: Mapping[str, Look], now: Mapping[str, Look]) -> Iterator[Symptom]:
    """Of every tensor the first that is found: a scale that collapsed saturates too."""
    for name in _in_both(start, now):
        found = (ask(start[name], now[name]) for ask in OF_A_TENSOR)
        yield from [symptom for symptom in found if symptom is not None][:1]


def unchanged(start: Mapping[str, Look], now: Mapping[str, Look], step: int, steps: int) -> Symptom | None:
    """Hardly a code of the trained weights changed, nor will one at this pace, because updates are too small.

    Args:
        start: looks by name.
        now: likewise.
        step: that was made last.
        steps: to be made in all.
    """
    pairs = [(start[name], now[name]) for name in _in_both(start, now) if now[name].trained]
    if not pairs:
        return None
    codes = sum(after.values.numel() for _, after in pairs)
    changed = sum(int((before.values != after.values).sum()) for before, after in pairs)
    update = max(float(half_steps(before, after).amax()) for before, after in pairs)
    ahead = steps / step
    if changed * ahead > _UNCHANGED * codes or not update * ahead < 1:
        return None
    if update == 0:
        figure = "no weight moved since the start"
        remedy = "see that gradients reach them; and raise train.learning_rate, which float32 may round away"
    else:
        figure = (
            f"{changed or 'none'} of {codes:,} sampled codes changed since the start; "
            f"the largest update is {update:.3g} times half a step between codes"
        )
        times = math.ceil(1 / (update * ahead))
        remedy = f"raise train.learning_rate or train.steps, together {times:,} times or more"
    return Symptom(module="all weights", what="nothing changes", figure=figure, remedy=remedy)


def half_steps(start: Look, now: Look) -> Tensor:
    """How far every value moved, in halves of the distance between its code at the start and the next."""
    levels = levels_of(now.quantizer.spec.format).to(now.position.device)
    gaps = torch.cat([levels.new_tensor([math.inf]), levels.diff(), levels.new_tensor([math.inf])])
    index = torch.bucketize(start.values.contiguous(), levels)
    return (now.position - start.position).abs() / (torch.minimum(gaps[index], gaps[index + 1]) / 2)


def levels_of(grid: Format) -> Tensor:
    """All finite values of a format, in order.

    >>> from recoup.numerics import IntFormat
    >>> levels_of(IntFormat(2, narrow=True))
    tensor([-1.,  0.,  1.])
    """
    signed = grid.code_dtype == torch.int8
    codes = torch.arange(-128, 128) if signed else torch.arange(2**grid.bits)
    values = grid.decode(codes.to(grid.code_dtype))
    return values[values.isfinite()].clamp(grid.lo, grid.hi).unique()


def off(model: nn.Module) -> Iterator[Symptom]:
    """Quantizers that let their tensor pass, where the quantized model is evaluated."""
    for module in model.modules():
        if isinstance(module, FakeQuantizer) and not module.enabled:
            yield Symptom(
                module=module.path,
                what="quantizer off",
                figure="its enabled is False at an evaluation, which is then of the float model",
                remedy="set it to True, and use quantization_off(model), which sets it back",
            )


def in_training(model: nn.Module) -> Iterator[Symptom]:
    """Modules that are in training mode at an evaluation, and compute something else there."""
    for name, module in model.named_modules():
        why = moved_by_training(module)
        if module.training and why is not None:
            yield Symptom(
                module=name or "the model",
                what="training mode",
                figure=f"at an evaluation a {type(module).__name__} is in training mode, so {why}",
                remedy="call model.eval(), and see that it reaches this module",
            )


OF_AN_EVALUATION: tuple[Callable[[nn.Module], Iterator[Symptom]], ...] = (off, in_training)


def of_an_evaluation(model: nn.Module) -> list[Symptom]:
    """Of a model, as it is while it is evaluated."""
    return [symptom for ask in OF_AN_EVALUATION for symptom in ask(model)]


def _in_both(start: Mapping[str, Look], now: Mapping[str, Look]) -> list[str]:
    return [name for name in now if name in start]


def _of(look: Look, what: str, figure: str, static: str, learned: str) -> Symptom:
    """What helps depends on whether ranges are learned."""
    remedy = learned if look.quantizer.spec.ranges == "learned" else static
    return Symptom(module=look.quantizer.path, what=what, figure=figure, remedy=remedy)
