"""A recipe: the whole run as data. What a user writes, checked before anything else happens.

Every section forbids unknown keys. `Recipe.load` turns the first mistake into one line with the path of
the key and the nearest legal spelling.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    TypeAdapter,
    model_validator,
)

from recoup.numerics import QuantSpec, Ranges, per_tensor
from recoup.numerics.kernels import Choice
from recoup.schemes.budget import seconds_of
from recoup.schemes.limit import Limit
from recoup.schemes.parse import parse
from recoup.schemes.presets import KV_PRESETS, kv_preset, preset
from recoup.schemes.scheme import Scheme

Rung = Literal["rtn", "moving-average", "percentile", "kl", "mse", "gptq", "qat"]  # in order of cost
LOSSES = ("task", "logits-kl", "hidden-mse", "hidden-cosine", "embedding-mse", "embedding-cosine")


def _scheme(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _SCHEMES.validate_python(value)
    return preset(value) if isinstance(value, str) else value


def _scheme_or_none(value: Any) -> Any:
    return None if value == "none" else _scheme(value)


def _as_written(scheme: Scheme | None) -> str | dict[str, Any]:
    """A preset by its name, a scheme of one's own spec by spec."""
    if scheme is None:
        return "none"
    try:
        return scheme.name if preset(scheme.name) == scheme else _SCHEMES.dump_python(scheme, mode="json")
    except ValueError:
        return _SCHEMES.dump_python(scheme, mode="json")


def _kv(value: Any) -> Any:
    if value is None or value == "none":
        return None
    spec = _SPECS.validate_python(value) if isinstance(value, Mapping) else value
    spec = kv_preset(spec) if isinstance(spec, str) else spec
    if isinstance(spec, QuantSpec) and (spec.ranges == "dynamic" or spec.granularity != per_tensor):
        raise ValueError(
            f"{spec.ranges} ranges per {spec.granularity} asked; an engine writes keys and values token by "
            "token, with one scale that is known before: take static or learned ranges, per tensor"
        )
    return spec


def _kv_as_written(spec: QuantSpec | None) -> str | dict[str, Any]:
    named = (name for name, known in KV_PRESETS.items() if known == spec)
    return "none" if spec is None else next(named, None) or _SPECS.dump_python(spec, mode="json")


_SPECS = TypeAdapter(QuantSpec)
_SCHEMES = TypeAdapter(Scheme)
_Written = PlainSerializer(_as_written)


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


def _inside(path: str) -> str:
    """A path that leads into a folder wherever that is: a recipe may be anybody's."""
    parts = PurePosixPath(path).parts
    windows = PureWindowsPath(path)
    if not parts or ".." in (*parts, *windows.parts) or path[0] in "~/" or windows.drive or windows.root:
        raise ValueError(f"{path!r} is not in the run's folder; name a folder in it, as artefact")
    return path


class _OnceLoader(yaml.SafeLoader):
    """YAML in which a key stands once; PyYAML itself lets the last one win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node."""
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice; keep one of them", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)


class Rule(_Section):
    """Which scheme the modules with matching names get. The first rule that matches a module wins.

    `match` is a shell pattern over full module names ("*.mlp.down_proj"); `scheme: none` keeps a module in
    float.
    """

    match: str = Field(min_length=1)
    scheme: Annotated[Scheme | None, BeforeValidator(_scheme_or_none), _Written]


class CalibrationSettings(_Section):
    """How many samples calibration sees."""

    samples: int = Field(default=512, ge=1)


class GateSettings(_Section):
    """A limit that the candidate must keep against the baseline; see `recoup.Gate`."""

    metric: str = Field(min_length=1)
    slice: str | None = None
    max_increase: Limit | None = None
    max_decrease: Limit | None = None
    interval: Literal["bootstrap", "none"] = "bootstrap"

    @model_validator(mode="after")
    def _one_direction(self) -> "GateSettings":
        if (self.max_increase is None) == (self.max_decrease is None):
            raise ValueError("a gate has either max_increase or max_decrease")
        return self


class LoraSettings(_Section):
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


class BatchNormSettings(_Section):
    """Norms that were folded into quantized layers normalise by batch again; see `recoup.add_batch_norm`.

    Args:
        freeze: their statistics stay as they are after so many steps; null moves them to the end.
        reestimate: so many batches of training give the statistics at the end; 0 leaves those of training.
    """

    freeze: int | None = Field(default=None, ge=0)
    reestimate: int = Field(default=20, ge=0)


class TrainSettings(_Section):
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


class ExportSettings(_Section):
    """Where the artefact goes: a target of `recoup.export`, and a folder in the run's.

    Args:
        target: a key of `recoup.export.TARGETS`.
        to: a name, or names with "/" between them; nothing outside the run's folder.
        tensor_parallel: devices over which the engine will split every matrix; asked before any work.
        consumer: who will read the artefact, as "vllm" or "vllm>=0.27"; asked before any work.
        gpu: the generation of GPU on which it will run, as "hopper"; asked before any work.
    """

    target: str = Field(default="onnx", min_length=1)
    to: Annotated[str, AfterValidator(_inside)] = "artefact"
    tensor_parallel: int = Field(default=1, ge=1)
    consumer: str | None = None
    gpu: str | None = None


class TaskSettings(BaseModel):
    """Which model and data. Keys beside `name` belong to the task, which checks them."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str

    @property
    def settings(self) -> dict[str, Any]:
        """All keys but the name."""
        return dict(self.model_extra or {})


class Recipe(_Section):
    """The whole run. Only `scheme` has no default.

    >>> Recipe(scheme="w4a8").rungs
    ('rtn', 'mse', 'qat')
    """

    scheme: Annotated[Scheme, BeforeValidator(_scheme), _Written]
    task: TaskSettings | None = None
    rules: tuple[Rule, ...] = ()
    outputs: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), description="modules whose outputs are quantized too, as the scheme quantizes inputs"
    )
    weight_ranges: Ranges | None = Field(
        default=None, description='replaces the ranges of every weight spec; "learned" trains the scales too'
    )
    kv: Annotated[QuantSpec | None, BeforeValidator(_kv), PlainSerializer(_kv_as_written)] = Field(
        default=None,
        description="of keys and values in the KV cache: fp8, or a spec; none leaves them in float",
    )
    impl: Choice = Field(
        default="auto",
        description="how fake quantization is computed: reference, fused, compiled, or auto; the same values",
    )
    calibration: CalibrationSettings = CalibrationSettings()
    rungs: tuple[Rung, ...] = Field(default=("rtn", "mse", "qat"), min_length=1)
    gates: tuple[GateSettings, ...] = ()
    train: TrainSettings = TrainSettings()
    export: ExportSettings = ExportSettings()
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _in_order_of_cost(self) -> "Recipe":
        order: Sequence[str] = get_args(Rung)
        if list(self.rungs) != sorted(set(self.rungs), key=order.index):
            raise ValueError(f"rungs go from cheap to dear, each once: a part of {', '.join(order)}")
        return self

    @model_validator(mode="after")
    def _budget_has_a_training(self) -> "Recipe":
        if self.train.budget is not None and "qat" not in self.rungs:
            raise ValueError(
                f"train.budget: {self.train.budget:g} seconds of re-tuning asked, and no rung trains; add "
                "qat to rungs, or leave the budget out"
            )
        return self

    @classmethod
    def load(cls, path: str | Path) -> "Recipe":
        """The recipe in a YAML file.

        Raises:
            ValueError: one line that names the file, the key and what to write instead.
            OSError: the file cannot be read.
        """
        try:
            data = yaml.load(Path(path).read_text(encoding="utf-8"), _OnceLoader)
        except yaml.YAMLError as error:
            where = getattr(error, "problem_mark", None)
            line = f" line {where.line + 1}" if where else ""
            problem = " ".join(str(getattr(error, "problem", error)).split())
            raise ValueError(f"{path}:{line} not YAML: {problem}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text at byte {error.start}") from None
        return parse(cls, data, str(path))

    def dump(self) -> str:
        """The recipe as YAML, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
