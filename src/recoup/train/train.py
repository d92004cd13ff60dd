"""The training loop: quantization-aware training of a prepared model.

AdamW on float32 master weights, warm-up and cosine, gradient clipping and accumulation, distillation from
the float model, and the best step by held-out loss. Devices and processes are accelerate's: started by
`torchrun` or `accelerate launch`, every process takes its own batches.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from recoup.nn import Batch, FakeQuantizer, call, quantization_off
from recoup.schemes.recipe import TrainSettings
from recoup.train.finite import NonFiniteLoss, first_nonfinite_module
from recoup.train.losses import Loss, build_loss, needs_teacher
from recoup.train.param_groups import check_scales_are_trained, param_groups

Record = Callable[[dict[str, float]], None]


def train(
    model: nn.Module,
    batches: Sequence[Batch],
    settings: TrainSettings | None = None,
    *,
    teacher: nn.Module | None = None,
    held_out: Sequence[Batch] = (),
    record: Record | None = None,
) -> nn.Module:
    """Train a prepared model under fake quantization; in place, returns the model.

    The weights end as those of the step with the lowest held-out loss, the start included, so training
    never leaves a model that is worse there than it was. Dropout is on only when the task loss is part of
    the loss: a teacher is followed without noise. Never touches the calibration of static ranges.

    Args:
        model: prepared and calibrated, in float32.
        batches: visited in order, again and again.
        settings: steps, rates and the loss; see `TrainSettings`.
        teacher: the float model; by default a copy of `model` as it is now, with quantization off.
        held_out: batches that are never trained on; without them the last step stays.
        record: called with {"step", "loss", "learning_rate", "held_out" where measured} as training goes.

    Raises:
        ValueError: the model is not prepared, has parameters that are not float32, or returns nothing
            that the loss could use; no batches.
        NonFiniteLoss: the loss or a gradient is not finite; names the first module with such a value.
    """
    from accelerate import Accelerator
    from accelerate.utils import send_to_device

    settings = settings or TrainSettings()
    record = record or _ignore
    _check(model, batches)
    accelerator = Accelerator(gradient_accumulation_steps=settings.accumulate)
    to_device: Callable[[Batch], Batch] = lambda batch: send_to_device(batch, accelerator.device)  # noqa: E731
    modes = {module: module.training for module in model.modules()}

    teaching = needs_teacher(settings.loss)
    if teaching:
        teacher = (teacher or float_copy(model)).to(accelerator.device).eval().requires_grad_(False)
    model.train("task" in ([settings.loss] if isinstance(settings.loss, str) else settings.loss))
    optimizer = torch.optim.AdamW(
        param_groups(model, settings.learning_rate, settings.scale_learning_rate, settings.weight_decay)
    )
    check_scales_are_trained(model, optimizer)
    schedule = LambdaLR(optimizer, warmup_cosine(settings.steps, settings.warmup))
    wrapped, stepper = accelerator.prepare(model, optimizer)

    def loss_of(module: nn.Module, batch: Batch, loss: Loss) -> Tensor:
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            with torch.no_grad():
                target = call(teacher, batch) if teacher is not None and teaching else None
            return loss(call(module, batch), target, batch)

    first = to_device(batches[0])
    with torch.no_grad():
        loss = build_loss(
            settings.loss, settings.temperature, call(teacher, first) if teaching and teacher else None
        )
    best = _Best(model)

    def look(step: int) -> dict[str, float]:
        if not held_out:
            return {}
        value = _held_out_loss(model, lambda batch: loss_of(model, to_device(batch), loss), held_out)
        best.offer(step, value)
        return {"held_out": value}

    try:
        record({"step": 0, **look(0)})
        stream = _stream(batches, accelerator.process_index, accelerator.num_processes)
        with _progress(accelerator.is_main_process) as progress:
            task = progress.add_task("training", total=settings.steps)
            for step in range(1, settings.steps + 1):
                total = 0.0
                learning_rate = schedule.get_last_lr()[0]
                for _ in range(settings.accumulate):
                    batch = to_device(next(stream))
                    with accelerator.accumulate(wrapped), _delayed(model, step <= settings.start_step):
                        value = loss_of(wrapped, batch, loss)
                        total += _finite(value, step, model, batch) / settings.accumulate
                        accelerator.backward(value)
                        if accelerator.sync_gradients:
                            norm = accelerator.clip_grad_norm_(model.parameters(), settings.clip_norm)
                            _finite(norm if norm is not None else value, step, model, batch)
                        stepper.step()
                        stepper.zero_grad()
                schedule.step()
                looked = step % settings.evaluate_every == 0 or step == settings.steps
                entry = {
                    "step": step,
                    "loss": total,
                    "learning_rate": learning_rate,
                    **(look(step) if looked else {}),
                }
                record(entry)
                progress.update(task, advance=1, description=f"training, loss {total:.4g}")
        if held_out:
            best.restore()
            record({"step": settings.steps, "best_step": best.step, "held_out": best.value})
    finally:
        accelerator.free_memory()
        for module, mode in modes.items():
            module.training = mode
    return model


def float_copy(model: nn.Module) -> nn.Module:
    """A prepared model's float self, as a model of its own: the teacher."""
    teacher = copy.deepcopy(model)
    for module in teacher.modules():
        if isinstance(module, FakeQuantizer):
            module.enabled = False
    return teacher


def warmup_cosine(steps: int, warmup: int) -> Callable[[int], float]:
    """The share of the learning rate at a step: up on a line, then down to 0 on half a cosine.

    >>> [round(warmup_cosine(10, 2)(step), 2) for step in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))

    return share


class _Best:
    """The weights of the best step so far, on the CPU."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.step, self.value = model, 0, math.inf
        self.state: dict[str, Tensor] = {}

    def offer(self, step: int, value: float) -> None:
        if value < self.value:
            self.step, self.value = step, value
            self.state = {k: v.detach().to("cpu", copy=True) for k, v in self.model.state_dict().items()}

    def restore(self) -> None:
        if self.state:
            self.model.load_state_dict(self.state)


@torch.no_grad()
def _held_out_loss(model: nn.Module, loss: Callable[[Batch], Tensor], batches: Sequence[Batch]) -> float:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    value = sum(float(loss(batch)) for batch in batches) / len(batches)
    for module, mode in modes.items():
        module.training = mode
    return value if math.isfinite(value) else math.inf


def _stream(batches: Sequence[Batch], process: int, processes: int) -> Iterator[Batch]:
    for index in count(process, processes):
        yield batches[index % len(batches)]


def _delayed(model: nn.Module, delayed: bool) -> Any:
    return quantization_off(model) if delayed else torch.enable_grad()


def _finite(value: Tensor, step: int, model: nn.Module, batch: Batch) -> float:
    number = float(value)
    if not math.isfinite(number):
        culprit = first_nonfinite_module(model, batch)
        raise NonFiniteLoss(f"step {step}: the loss or its gradient is {number}; first in {culprit}")
    return number


def _check(model: nn.Module, batches: Sequence[Batch]) -> None:
    quantizers = [module for module in model.modules() if isinstance(module, FakeQuantizer)]
    if not quantizers:
        raise ValueError("nothing to train under: the model is not prepared; run recoup.prepare first")
    for quantizer in quantizers:
        if not quantizer.calibrated:
            raise ValueError(
                f"{quantizer.path}: its range is not known; run recoup.calibrate(model, batches) first"
            )
    low = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32]
    if low:
        raise ValueError(
            f"{low[0]} and {len(low) - 1} more are not float32; training needs float32 master weights: model.float()"
        )
    if not batches:
        raise ValueError("training: no batches")


def _progress(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown)


def _ignore(_: dict[str, float]) -> None:
    """Nobody records."""
