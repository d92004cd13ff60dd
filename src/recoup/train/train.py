"""The training loop: quantization-aware training of a prepared model.

AdamW on float32 master weights, warm-up and cosine, gradient clipping and accumulation, distillation from
the float model, and the best step by held-out loss. Devices and processes are accelerate's: started by
`torchrun` or `accelerate launch`, every process takes its own batches.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from recoup.nn import Batch, FakeQuantizer, device_of, moved, quantization_off
from recoup.progress import progress
from recoup.schemes.recipe import TrainSettings
from recoup.train.finite import NonFiniteLossError, first_nonfinite_module
from recoup.train.objective import Objective, float_copy
from recoup.train.param_groups import param_groups

Record = Callable[[Mapping[str, float]], None]


def train(
    model: nn.Module,
    batches: Sequence[Batch],
    settings: TrainSettings | None = None,
    *,
    teacher: nn.Module | None = None,
    held_out: Sequence[Batch] = (),
    record: Record = lambda _: None,
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
        NonFiniteLossError: the loss or a gradient is not finite; names the first module with such a value.
    """
    from accelerate import Accelerator

    settings = settings or TrainSettings()
    _check(model, batches)
    # Unless told that it runs on the CPU, accelerate takes the processes of torchrun for so many single ones.
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(), gradient_accumulation_steps=settings.accumulate
    )
    teacher = float_copy(model) if teacher is None else teacher
    home = device_of(model)
    modes = {module: module.training for root in (model, teacher) for module in root.modules()}
    objective = Objective(settings, teacher, accelerator.device, batches[0])
    optimizer = torch.optim.AdamW(
        param_groups(model, settings.learning_rate, settings.scale_learning_rate, settings.weight_decay)
    )
    schedule = LambdaLR(optimizer, warmup_cosine(settings.steps, settings.warmup))
    wrapped, stepper = accelerator.prepare(model, optimizer)
    stream = _stream(batches, accelerator.process_index, accelerator.num_processes)
    best = _Best(model, objective, held_out)

    def step_once(step: int) -> float:
        total = 0.0
        for _ in range(settings.accumulate):
            batch = moved(next(stream), accelerator.device)
            with accelerator.accumulate(wrapped), _delayed(model, step <= settings.start_step):
                loss = objective(wrapped, batch)
                total += _finite(loss, step, model, batch) / settings.accumulate
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), settings.clip_norm)
                    _finite(loss if norm is None else norm, step, model, batch)
                stepper.step()
                stepper.zero_grad()
        return total

    try:
        model.train("task" in ([settings.loss] if isinstance(settings.loss, str) else settings.loss))
        record({"step": 0, **best.look(0)})
        with progress("training", settings.steps, shown=accelerator.is_main_process) as advance:
            for step in range(1, settings.steps + 1):
                learning_rate = float(schedule.get_last_lr()[0])
                loss = step_once(step)
                schedule.step()
                look = step % settings.evaluate_every == 0 or step == settings.steps
                seen: dict[str, float] = best.look(step) if look else {}
                record({"step": step, "loss": loss, "learning_rate": learning_rate, **seen})
                advance(f"training, loss {loss:.4g}")
        best.restore()
    finally:
        accelerator.free_memory()
        model.to(home)
        for module, mode in modes.items():
            module.training = mode
    return model


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
    """The weights of the step with the lowest held-out loss so far, on the CPU."""

    def __init__(self, model: nn.Module, objective: Objective, held_out: Sequence[Batch]) -> None:
        self.model, self.objective, self.held_out = model, objective, held_out
        self.value = math.inf
        self.state: dict[str, Tensor] = {}

    def look(self, step: int) -> dict[str, float]:
        if not self.held_out:
            return {}
        value = self.objective.mean(self.model, self.held_out)
        if step == 0 or value < self.value:
            self.value = value
            self.state = {k: v.detach().to("cpu", copy=True) for k, v in self.model.state_dict().items()}
        return {"held_out": value}

    def restore(self) -> None:
        if self.state:
            self.model.load_state_dict(self.state)


def _stream(batches: Sequence[Batch], process: int, processes: int) -> Iterator[Batch]:
    for index in count(process, processes):
        yield batches[index % len(batches)]


def _delayed(model: nn.Module, delayed: bool) -> Any:
    return quantization_off(model) if delayed else nullcontext()


def _finite(value: Tensor, step: int, model: nn.Module, batch: Batch) -> float:
    number = float(value.detach())
    if not math.isfinite(number):
        culprit = first_nonfinite_module(model, batch)
        raise NonFiniteLossError(f"step {step}: the loss or its gradient is {number}; first in {culprit}")
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
            f"{low[0]} and {len(low) - 1} more parameters are not float32; training needs float32 master "
            "weights: call model.float() before recoup.prepare"
        )
    if not batches:
        raise ValueError("training: no batches")
