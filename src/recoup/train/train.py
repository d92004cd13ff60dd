"""The training loop: quantization-aware training of a prepared model.

AdamW on float32 master weights, warm-up and cosine, gradient clipping and accumulation, distillation from
the float model, and the best step by held-out loss. Devices and processes are accelerate's: started by
`torchrun` or `accelerate launch`, every process takes its own batches.

With a folder for checkpoints, nothing is lost: a training that was killed goes on when it is called again,
and ends with the very bits it would have ended with.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recoup.nn import Batch, NonFiniteError, device_of, evaluating, moved, quantization_off
from recoup.progress import progress
from recoup.schemes.training import TrainSettings
from recoup.train.activations import activations_recomputed
from recoup.train.batch_norm import kept_norms, normed, reestimate
from recoup.train.best import Best
from recoup.train.checkpoints import Checkpoints
from recoup.train.dampening import dampen
from recoup.train.examination import Examination
from recoup.train.fingerprint import fingerprint
from recoup.train.finite import (
    NonFiniteLossError,
    first_nonfinite_gradient,
    first_nonfinite_module,
    nonfinite_held_out,
)
from recoup.train.interrupt import interrupt_waits
from recoup.train.lora import trained_parameters
from recoup.train.losses import names_of, needs_teacher
from recoup.train.objective import Objective
from recoup.train.param_groups import param_groups
from recoup.train.progressive import Bits, check_progressive
from recoup.train.rng import rng_state, set_rng_state
from recoup.train.rounding import codes_drawn, seed_of_step
from recoup.train.schedule import rising, warmup_cosine
from recoup.train.snapshot import check_state, load_state_of, moving_state_of, state_of
from recoup.train.teacher import Teacher, float_copy, in_memory, on_disk
from recoup.train.trainable import check_trainable

Record = Callable[[Mapping[str, float]], None]


def train(
    model: nn.Module,
    batches: Sequence[Batch],
    settings: TrainSettings | None = None,
    *,
    teacher: nn.Module | None = None,
    held_out: Sequence[Batch] = (),
    record: Record = lambda _: None,
    checkpoints: str | Path | None = None,
) -> nn.Module:
    """Train a prepared model under fake quantization; in place, returns the model.

    The weights end as those of the step with the lowest held-out loss, the start included, so training
    never leaves a model that is worse there than it was. Dropout is on only when the task loss is part of
    the loss: a teacher is followed without noise. Adapters of `settings.lora` are merged at the end; those of
    `add_lora` stay. So are norms of `settings.batch_norm`, and so do those of `add_batch_norm`. Never touches
    what is frozen, nor the calibration of static ranges but where new statistics of norms are a factor of it,
    or `settings.progressive` changed a weight's bits and chose its ranges anew.

    What goes wrong with quantizers is looked for after the first step, at every look at held-out batches and
    at the end; it is logged as a warning of the logger "recoup", and kept as `model.recoup_symptoms`, a list
    of `Symptom`. docs/runs.md has the table of them.

    Args:
        model: prepared and calibrated, in float32.
        batches: visited in order, again and again.
        settings: steps, rates and the loss; see `TrainSettings`.
        teacher: the float model; by default `model` as it is now, with quantization off: a copy of it, but
            with `teacher_logits` the model itself.
        held_out: batches that are never trained on; without them the last step stays.
        record: called with {"step", "loss", "learning_rate", "held_out" where measured, "stopped_early" at
            a last step that is not `settings.steps`} as training goes, and with {"step", "reestimated",
            "held_out"} once the statistics of norms are from so many batches; entries from before an
            interruption are told again.
        checkpoints: a folder. Every `settings.checkpoint_every` steps, after the last one and at Ctrl-C, all
            that training knows is saved there; the same call goes on from it, to the same bits. With
            `teacher_logits` the teacher's answers are kept there, too.

    Raises:
        ValueError: the model is not prepared, has parameters that are not float32 or state that is no
            tensor, or returns nothing that the loss could use; nothing to train; see `add_lora` and
            `add_batch_norm`; norms in several processes; no batches; early stop without held-out batches; a
            budget; checkpoints of another training.
        NonFiniteLossError: the loss or a gradient is not finite; names the first place with such a value.
        OSError: a checkpoint cannot be written; those before it are kept.
    """
    from accelerate import Accelerator

    settings = settings or TrainSettings()
    check_trainable(model)
    check_state(model)
    check_progressive(model, settings.progressive)
    _check_batches(batches, settings, held_out)
    if settings.budget is not None:
        raise ValueError(
            f"budget: {settings.budget:g} seconds of re-tuning asked, and a training asks no gate that it "
            "could miss; use recoup.recover, or leave the budget out"
        )
    if settings.teacher_logits is not None and checkpoints is None:
        raise ValueError(
            "teacher_logits: a teacher's answers lie beside the checkpoints; pass checkpoints=folder"
        )
    # Unless told that it runs on the CPU, accelerate takes the processes of torchrun for so many single ones.
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(), gradient_accumulation_steps=settings.accumulate
    )
    if settings.batch_norm is not None and accelerator.num_processes > 1:
        raise ValueError(
            f"batch_norm: asked in {accelerator.num_processes} processes, and each would have statistics of "
            "its own; train in one process, or leave it out"
        )
    identity, saves = dict[str, Any](), None
    if checkpoints is not None:
        identity = _identity(model, batches, settings, teacher, held_out)
        identity["processes"] = accelerator.num_processes
        saves = Checkpoints(Path(checkpoints), identity, writes=accelerator.is_main_process)
    home, roots = device_of(model), (model,) if teacher is None else (model, teacher)
    modes = {module: module.training for root in roots for module in root.modules()}
    try:
        # Both merge where it was trained, for the same bits.
        with kept_norms(model, kept=settings.batch_norm is not None), trained_parameters(model, settings):
            if settings.teacher_logits is None or checkpoints is None:
                asked = _in_memory(model, teacher, settings, accelerator.device)
            else:
                folder = Path(checkpoints, "teacher")
                with nullcontext() if teacher else quantization_off(model):
                    asked = on_disk(
                        teacher or model, (batches, held_out), settings, folder, identity, accelerator
                    )
            objective = Objective(settings, asked, accelerator.device, batches[0])
            training = _Training(model, batches, settings, objective, held_out, accelerator)
            model.train("task" in names_of(settings.loss))
            recomputed = activations_recomputed(model) if settings.activation_checkpointing else nullcontext()
            with closing(training.bits), recomputed:
                training.run(record, saves)
    finally:
        accelerator.free_memory()
        model.to(home)
        for module, mode in modes.items():
            module.training = mode
    return model


class _Training:
    """What a training knows, how it makes a step, and how it is saved.

    The learning rate and the position in the batches follow from the step, so neither is state.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        settings: TrainSettings,
        objective: Objective,
        held_out: Sequence[Batch],
        accelerator: Any,
    ) -> None:
        self.model, self.batches, self.settings = model, batches, settings
        self.objective, self.accelerator = objective, accelerator
        self.optimizer = torch.optim.AdamW(
            param_groups(model, settings.learning_rate, settings.scale_learning_rate, settings.weight_decay)
        )
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.share = warmup_cosine(settings.steps, settings.warmup)
        self.wrapped, self.stepper = accelerator.prepare(model, self.optimizer)
        self.bits = Bits(model, settings)
        self.seed: int | None = None
        self.best = Best(model, objective, held_out, settings)
        self.examination = Examination(
            model,
            batches[0],
            steps=settings.steps,
            warmup=settings.warmup,
            tells=accelerator.is_main_process,
        )
        self.step = 0
        self.history: list[dict[str, float]] = []

    def run(self, record: Record, checkpoints: Checkpoints | None) -> None:
        """From the newest checkpoint, or from the start, to the last step; then back to the best one."""
        saved = (
            None if checkpoints is None else checkpoints.newest(quiet=not self.accelerator.is_main_process)
        )
        if saved is None:
            self._tell({"step": 0, **self._look()}, record)
        else:
            self._resume(*saved)
            for entry in self.history:
                record(entry)
        last, single = self.settings.steps, self.accelerator.num_processes == 1
        waits: AbstractContextManager[Callable[[], bool]] = (
            interrupt_waits() if checkpoints is not None and single else nullcontext(lambda: False)
        )
        stream = self._stream()
        with waits as interrupted, progress("training", last, shown=self.accelerator.is_main_process) as bar:
            for _ in range(self.step):
                bar("training")
            while self.step < last and not self.best.is_long_ago:
                loss = self._one_step(stream, record)
                bar(f"training, loss {loss:.4g}")
                over = self.step == last or self.best.is_long_ago
                if checkpoints is not None and (
                    over or interrupted() or self.step % self.settings.checkpoint_every == 0
                ):
                    self._save(checkpoints)
                if interrupted():
                    raise KeyboardInterrupt
        self.best.restore()
        self._reestimate(record)
        self.model.recoup_symptoms = self.examination.symptoms  # pyright: ignore[reportArgumentType]

    def _one_step(self, stream: Iterator[Batch], record: Record) -> float:
        self.step += 1
        self.bits.enter(self.step, self.optimizer)
        if self.settings.rounding == "stochastic":
            self.seed = seed_of_step()
        frozen = self.settings.freeze_ranges is not None and self.step > self.settings.freeze_ranges
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = 0.0 if frozen and group["ranges"] else rate * self.share(self.step - 1)
        if self.settings.batch_norm is not None:
            freeze = self.settings.batch_norm.freeze
            for layer in normed(self.model).values():  # also where a teacher is followed in evaluation mode
                layer.batch_norm.train(freeze is None or self.step <= freeze)
        loss = sum(self._accumulate(next(stream)) for _ in range(self.settings.accumulate))
        entry = {"step": self.step, "loss": loss, "learning_rate": self.optimizer.param_groups[0]["lr"]}
        ends = self.step == self.settings.steps
        looks = self.bits.are_own and (ends or self.step % self.settings.evaluate_every == 0)
        if looks:
            entry |= self._look()
        if looks or (self.bits.are_own and self.step == 1):
            self.examination.tensors(self.step)
        if self.best.is_long_ago and not ends:
            entry["stopped_early"] = 1.0
        self._tell(entry, record)
        return loss

    def _reestimate(self, record: Record) -> None:
        """Take the statistics of norms from batches of training, and keep them if held-out batches agree."""
        if self.settings.batch_norm is None or not self.settings.batch_norm.reestimate:
            return
        taken = min(self.settings.batch_norm.reestimate, len(self.batches))
        reestimate(self.model, [self.batches[index] for index in range(taken)])
        self._tell({"step": self.step, "reestimated": taken, **self._look()}, record)
        self.best.restore()

    def _look(self) -> dict[str, float]:
        """At the held-out batches, and at the model as it is evaluated."""
        found = self.best.look(self.step)
        with evaluating(self.model):
            self.examination.evaluation(self.step)
            if found.get("held_out") == math.inf:
                self.examination.tell(self.step, [nonfinite_held_out(self.model, self.best.held_out)])
        return found

    def _accumulate(self, batch: Batch) -> float:
        """One batch of a step; its share of the step's loss."""
        batch = moved(batch, self.accelerator.device)
        delayed = self.step <= self.settings.start_step
        lattice = quantization_off(self.model) if delayed else nullcontext()
        rounding = codes_drawn(self.model, self.seed)
        with self.accelerator.accumulate(self.wrapped), lattice, rounding:
            try:
                loss = self.objective(self.wrapped, batch)
            except NonFiniteError:
                raise self._stopped_by(math.nan, batch) from None
            value = float(loss.detach())
            if not math.isfinite(value):
                raise self._stopped_by(value, batch)
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                if self.settings.dampening and not delayed:
                    share = rising(self.step, self.settings.start_step, self.settings.steps)
                    dampen(self.model, self.settings.dampening * share)
                self._clip()
            self.stepper.step()
            self.stepper.zero_grad()
        return value / self.settings.accumulate

    def _stopped_by(self, loss: float, batch: Batch) -> NonFiniteLossError:
        culprit = first_nonfinite_module(self.model, batch)
        return NonFiniteLossError(f"step {self.step}: the loss is {loss}; first in {culprit}")

    def _clip(self) -> None:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not math.isfinite(float(norm)):  # asked before clipping, which would spread it to all
            culprit = first_nonfinite_gradient(self.model)
            raise NonFiniteLossError(
                f"step {self.step}: the loss is finite, but its gradient is {float(norm)}; first in {culprit}"
            )
        nn.utils.clip_grads_with_norm_(parameters, self.settings.clip_norm, norm)

    def _tell(self, entry: dict[str, float], record: Record) -> None:
        self.history.append(entry)
        record(entry)

    def _stream(self) -> Iterator[Batch]:
        """The batches of this process, from those of the next step on."""
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        seen = self.step * self.settings.accumulate  # now: the step moves on while the stream is read
        return (self.batches[i % len(self.batches)] for i in count(process + seen * processes, processes))

    def _save(self, checkpoints: Checkpoints) -> None:
        from accelerate.utils import gather_object

        parts: dict[str, Mapping[str, Tensor]] = {
            "weights": moving_state_of(self.model),
            "optimizer": {
                f"{parameter}.{name}": value
                for parameter, state in self.optimizer.state_dict()["state"].items()
                for name, value in state.items()
            },
        }
        if self.best.state and self.best.step != self.step:
            parts["best"] = self.best.state
        checkpoints.save(
            self.step,
            parts,
            {
                "best": self.best.facts(),
                "history": self.history,
                "symptoms": self.examination.facts(),
                "rng": gather_object([rng_state(self.accelerator.device)]),
            },
        )

    def _resume(self, parts: dict[str, dict[str, Tensor]], facts: dict[str, Any]) -> None:
        self.step, self.history = facts["step"], facts["history"]
        self.bits.resume(self.step)
        self.examination.resume(facts.get("symptoms", []))  # none were kept at first
        load_state_of(self.model, parts["weights"])
        states: dict[int, dict[str, Tensor]] = {}
        for name, value in parts["optimizer"].items():
            parameter, _, key = name.partition(".")
            states.setdefault(int(parameter), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})
        here = facts["best"]["step"] == self.step
        self.best.resume(facts["best"], parts["weights"] if here else parts.get("best", {}))
        set_rng_state(facts["rng"][self.accelerator.process_index], self.accelerator.device)


def _in_memory(
    model: nn.Module, teacher: nn.Module | None, settings: TrainSettings, device: torch.device
) -> Teacher | None:
    if not needs_teacher(settings.loss):
        return None
    return in_memory(float_copy(model) if teacher is None else teacher, device)


def _identity(
    model: nn.Module,
    batches: Sequence[Batch],
    settings: TrainSettings,
    teacher: nn.Module | None,
    held_out: Sequence[Batch],
) -> dict[str, Any]:
    """What a training follows from. What only decides when it is saved, and in what memory, is left out."""
    without = {"checkpoint_every", "activation_checkpointing", "budget"}
    return {
        "settings": settings.model_dump(mode="json", exclude=without),
        "model": fingerprint(state_of(model)),
        "teacher": None if teacher is None else fingerprint(state_of(teacher)),
        "batches": fingerprint(batches[index] for index in range(len(batches))),
        "held-out batches": fingerprint(held_out[index] for index in range(len(held_out))),
    }


def _check_batches(batches: Sequence[Batch], settings: TrainSettings, held_out: Sequence[Batch]) -> None:
    if not batches:
        raise ValueError("training: no batches")
    if settings.early_stop is not None and not held_out:
        raise ValueError("early_stop: looks at held-out batches and there are none; pass held_out=batches")
