"""Quantization-aware training with the stock `transformers.Trainer`: prepare the model, add one callback.

    recoup.calibrate(recoup.prepare(model, plan), batches)
    Trainer(model=model, ..., callbacks=[recoup.hf.QATCallback(start_step=100)]).train()

The loop, the optimizer and the checkpoints are the Trainer's. Everything that is learned is in the model's
`state_dict`, so `train(resume_from_checkpoint=True)` goes on as it does with any other model.
"""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from recoup.nn import FakeQuantizer
from recoup.train import Examination, check_scales_are_trained, check_trainable
from recoup.validate.symptoms import Symptom

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError("recoup.hf needs transformers: pip install 'recoup[transformers]'") from error


class QATCallback(TrainerCallback):
    """Checks that a Trainer can train a prepared model, and switches quantization on at its step.

    Between the steps quantization is always on: what is evaluated and what is saved is the quantized model.
    After the first step, after each evaluation and at the end it looks for symptoms, which are logged as
    warnings; inputs are looked at with the batch that `calibrate` left in the model.

    Args:
        start_step: so many optimizer steps are made in float first.
    """

    def __init__(self, start_step: int = 0) -> None:
        if start_step < 0:
            raise ValueError(f"start_step: {start_step} given; it is 0 or more")
        self.start_step = start_step
        self.examination: Examination | None = None

    @property
    def symptoms(self) -> list[Symptom]:
        """What the training showed of its quantizers since it began, or went on."""
        return [] if self.examination is None else self.examination.symptoms

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Refuse what would not be trained as it looks.

        Raises:
            ValueError: the model is not prepared, calibrated and in float32; the optimizer misses a learned
                scale; `start_step` leaves no step.
        """
        del control, kwargs
        assert model is not None
        assert optimizer is not None
        check_trainable(model)
        check_scales_are_trained(model, optimizer)
        if self.start_step >= state.max_steps:
            raise ValueError(
                f"start_step: {self.start_step} leaves none of {state.max_steps} steps to train under "
                "quantization; make it smaller"
            )
        _switch(model, on=True)
        self.examination = Examination(
            model,
            getattr(model, "recoup_example", None),
            begun=state.global_step,
            steps=state.max_steps,
            warmup=args.get_warmup_steps(state.max_steps),
            tells=state.is_world_process_zero,
        )

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Off in the first steps."""
        del args, control, kwargs
        assert model is not None
        _switch(model, on=state.global_step >= self.start_step)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """On for whatever is between the steps; and looked at after the first one."""
        del args, control, kwargs
        assert model is not None
        assert self.examination is not None
        _switch(model, on=True)
        if state.global_step == self.examination.begun + 1:
            self.examination.tensors(state.global_step)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The model's modes and switches, while it is evaluated."""
        del args, control, kwargs
        if self.examination is not None:
            self.examination.evaluation(state.global_step)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Looked at again."""
        del args, control, kwargs
        if self.examination is not None:
            self.examination.tensors(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Looked at for the last time."""
        del args, control, kwargs
        assert self.examination is not None
        self.examination.tensors(state.global_step)


def _switch(model: nn.Module, *, on: bool) -> None:
    for module in model.modules():
        if isinstance(module, FakeQuantizer):
            module.enabled = on
