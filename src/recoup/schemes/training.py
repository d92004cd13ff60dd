"""The section of a recipe that says how to train, and what is no way to."""

import math
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from recoup.schemes.parse import Section

LOSSES = ("task", "logits-kl", "hidden-mse", "hidden-cosine", "embedding-mse", "embedding-cosine")
_UNITS = {"s": 1, "m": 60, "h": 3600}


def _known_losses(value: str | dict[str, float]) -> str | dict[str, float]:
    for name in [value] if isinstance(value, str) else value:
        legal = ("distill", *LOSSES) if isinstance(value, str) else LOSSES
        if name not in legal:
            nearest = get_close_matches(name, legal, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(legal)}"
            raise ValueError(f"no loss {name!r}; {hint}")
    if not value:
        raise ValueError(f"an empty mixture of losses; there are {', '.join(LOSSES)}")
    return value


def seconds_of(value: Any) -> float | None:
    """The seconds of a budget; None where there is none.

    Raises:
        ValueError: it is no time, or not above 0.

    >>> seconds_of("30m"), seconds_of(90)
    (1800.0, 90.0)
    """
    if value is None:
        return None
    written = str(value).strip()
    number, unit = (written[:-1], written[-1]) if written[-1:] in _UNITS else (written, "s")
    try:
        seconds = float(number) * _UNITS[unit]
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"{value!r} is no time above 0; write 30m, 2h, 90s, or a number of seconds")
    return seconds


class LoraSettings(Section):
    """Adapters of low rank, in PEFT's words and with its defaults.

    Args:
        rank: of every adapter; `r` there.
        alpha: the product is scaled by alpha / rank.
        targets: linear layers, by their names or the ends of these; or one regular expression for the whole
            name; "all-linear" is every quantized one.
        dropout: share of the columns of A that a training pass leaves out, for all tokens alike.
        rslora: scaled by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732).
    """

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=8.0, gt=0)
    targets: str | tuple[str, ...] = "all-linear"
    dropout: float = Field(default=0.0, ge=0, lt=1)
    rslora: bool = False

    @property
    def scaling(self) -> float:
        """What the product is multiplied with."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


class BatchNormSettings(Section):
    """Norms that were folded into quantized layers normalise by batch again; see `recoup.add_batch_norm`.

    Args:
        freeze: their statistics stay as they are after so many steps; null moves them to the end.
        reestimate: so many batches of training give the statistics at the end; 0 leaves those of training.
    """

    freeze: int | None = Field(default=None, ge=0)
    reestimate: int = Field(default=20, ge=0)


class TrainSettings(Section):
    """Quantization-aware training.

    Args:
        steps: optimizer steps.
        learning_rate: of the weights, at the end of the warm-up; it falls to 0 on a cosine.
        scale_learning_rate: of learned scales; the weights' where absent.
        weight_decay: of the weights; scales, biases and norms have none.
        warmup: steps over which the learning rate rises from 0.
        start_step: quantization is off for so many steps first.
        freeze_ranges: learned scales and offsets stay as they are after so many steps; null trains them to
            the end.
        dampening: the weight of a penalty on |Q(w) - clip(w)|^2 of every quantized weight, which holds back
            those that oscillate between two codes; it rises from 0 on half a cosine.
        rounding: of weights where gradients are made. "stochastic" draws one of a weight's two neighbouring
            codes for a step, the nearer one more often (Gupta et al. 2015, arXiv:1502.02551);
            whatever is evaluated or ships has the nearest.
        progressive: integer weights of fewer bits train with so many first, then with the next, and at last
            with their own (Zhuang et al. 2018, arXiv:1711.00205), in equal phases. Only the start and
            the last phase are looked at.
        clip_norm: gradients are scaled down to this norm.
        accumulate: batches per optimizer step.
        precision: "bf16" is autocast; the master weights are float32 either way.
        loss: "task" is the model's own; "distill" follows the float model in whatever it returns (logits
            by KL divergence, else hidden states or embeddings); or one of the distillation losses; or a
            mixture {task: 0.3, logits-kl: 0.7}.
        temperature: of logits-kl.
        teacher_logits: the float model is asked once for every batch, and its so many most likely classes at
            every place are kept on disk, instead of the model in memory; null for the model. For logits-kl,
            alone or beside the task's loss.
        evaluate_every: steps between looks at the held-out batches; the best step is kept.
        held_out: share of the training batches that is never trained on, for those looks.
        early_stop: training ends after so many looks in a row without a lower held-out loss; null for never.
        checkpoint_every: steps between checkpoints, where training has a folder for them.
        activation_checkpointing: activations are computed again for the gradient instead of kept; the same
            result to the bit, in less memory and more time.
        parameters: "scales" trains learned scales and offsets alone (EfficientQAT's end-to-end phase, Chen et
            al. 2024, arXiv:2407.11062, section 3.3).
        batch_norm: norms that were folded normalise by batch again; null leaves them folded.
        lora: trains adapters, and scales that are learned, in place of everything; they are merged at the
            end.
        budget: seconds of re-tuning where the rung qat misses a gate, as "30m" or 1800; null for none. A
            ladder has it; `recoup.train` asks no gates.
    """

    steps: int = Field(default=500, ge=1)
    learning_rate: float = Field(default=1e-5, gt=0)
    scale_learning_rate: float | None = Field(default=None, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup: int = Field(default=0, ge=0)
    start_step: int = Field(default=0, ge=0)
    freeze_ranges: int | None = Field(default=None, ge=0)
    dampening: float = Field(default=0.0, ge=0)
    rounding: Literal["nearest", "stochastic"] = "nearest"
    progressive: tuple[Annotated[int, Field(ge=3, le=8)], ...] = ()
    clip_norm: float = Field(default=1.0, gt=0)
    accumulate: int = Field(default=1, ge=1)
    precision: Literal["float32", "bf16"] = "float32"
    loss: Annotated[str | dict[str, Annotated[float, Field(gt=0)]], AfterValidator(_known_losses)] = "distill"
    temperature: float = Field(default=1.0, gt=0)
    teacher_logits: int | None = Field(default=None, ge=1)
    evaluate_every: int = Field(default=50, ge=1)
    held_out: float = Field(default=0.05, gt=0, lt=1)
    early_stop: int | None = Field(default=None, ge=1)
    checkpoint_every: int = Field(default=50, ge=1)
    activation_checkpointing: bool = False
    parameters: Literal["all", "scales"] = "all"
    batch_norm: BatchNormSettings | None = None
    lora: LoraSettings | None = None
    budget: Annotated[float | None, BeforeValidator(seconds_of)] = None

    @model_validator(mode="after")
    def _one_choice_of_parameters(self) -> "TrainSettings":
        if self.lora is not None and self.parameters == "scales":
            raise ValueError("lora and parameters: scales asked; adapters train, or scales alone do")
        if self.dampening and (self.lora is not None or self.parameters == "scales"):
            raise ValueError(
                f"dampening {self.dampening} asked; it pulls weights, and adapters or scales alone train "
                "none: set it to 0"
            )
        if self.rounding == "stochastic" and self.parameters == "scales":
            raise ValueError(
                "rounding: stochastic and parameters: scales asked; codes are drawn where weights train, and "
                "scales alone train none: leave one out"
            )
        if self.rounding == "stochastic" and self.dampening:
            raise ValueError(
                f"rounding: stochastic and dampening {self.dampening} asked; one has weights change codes, "
                "and the other holds them back: leave one out"
            )
        if self.progressive and self.parameters == "scales":
            raise ValueError(
                f"progressive {[*self.progressive]} and parameters: scales asked; scales are chosen anew at "
                "every change of bits, and nothing else trains: leave one out"
            )
        if self.lora is not None and self.lora.dropout and "task" not in self.loss:
            raise ValueError(
                f"lora.dropout {self.lora.dropout} asked, but a loss without task follows the float model "
                "without noise; set it to 0, or mix in task"
            )
        return self

    @model_validator(mode="after")
    def _norms_see_training(self) -> "TrainSettings":
        if self.batch_norm is None:
            return self
        if self.lora is not None or self.parameters == "scales":
            trained = "adapters" if self.lora is not None else "scales alone"
            raise ValueError(
                f"batch_norm asked, and {trained} train, which leaves norms as they are; leave it out"
            )
        if self.activation_checkpointing:
            raise ValueError(
                "batch_norm and activation_checkpointing asked; computing twice would move statistics twice: "
                "leave one out"
            )
        if self.batch_norm.freeze is not None and self.batch_norm.freeze >= self.steps:
            raise ValueError(
                f"batch_norm.freeze {self.batch_norm.freeze} asked of {self.steps} steps, so none would "
                "freeze; leave it out, and statistics move to the end"
            )
        return self

    @model_validator(mode="after")
    def _leaves_steps(self) -> "TrainSettings":
        if max(self.warmup, self.start_step) >= self.steps:
            raise ValueError(
                f"{self.steps} steps leave none after {self.warmup} of warm-up and a start at "
                f"{self.start_step}"
            )
        return self

    @model_validator(mode="after")
    def _bits_fall(self) -> "TrainSettings":
        bits = [*self.progressive]
        falling = sorted({*bits}, reverse=True)
        if bits != falling:
            raise ValueError(
                f"progressive {bits} asked, and bits fall from one phase to the next: write {falling}"
            )
        quantized = self.steps - self.start_step
        if bits and quantized <= len(bits):
            raise ValueError(
                f"progressive {bits} asked, and {quantized} steps under quantization are too few for "
                f"{len(bits) + 1} phases; ask for more steps, or fewer phases"
            )
        return self

    @model_validator(mode="after")
    def _logits_are_enough(self) -> "TrainSettings":
        names = {self.loss} if isinstance(self.loss, str) else set(self.loss)
        if self.teacher_logits is not None and (
            names == {"task"} or names - {"task", "logits-kl", "distill"}
        ):
            raise ValueError(
                f"teacher_logits: kept for logits-kl, and the loss is {', '.join(sorted(names))}; take "
                "logits-kl, or a mixture of it and task"
            )
        return self
