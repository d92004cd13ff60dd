"""A recipe: the whole run as data. What a user writes, checked before anything else happens.

Every section forbids unknown keys. `Recipe.load` turns the first mistake into one line with the path of
the key and the nearest legal spelling.
"""

from collections.abc import Mapping, Sequence
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
from recoup.schemes.limit import Limit
from recoup.schemes.parse import Section, parse
from recoup.schemes.presets import KV_PRESETS, kv_preset, preset
from recoup.schemes.scheme import Scheme
from recoup.schemes.training import TrainSettings

Rung = Literal["rtn", "moving-average", "percentile", "kl", "mse", "gptq", "bias", "qat"]  # in order of cost


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


class Rule(Section):
    """Which scheme the modules with matching names get. The first rule that matches a module wins.

    `match` is a shell pattern over full module names ("*.mlp.down_proj"); `scheme: none` keeps a module in
    float.
    """

    match: str = Field(min_length=1)
    scheme: Annotated[Scheme | None, BeforeValidator(_scheme_or_none), _Written]


class CalibrationSettings(Section):
    """How many samples calibration sees."""

    samples: int = Field(default=512, ge=1)


class GateSettings(Section):
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


class ExportSettings(Section):
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


class Recipe(Section):
    """The whole run. Only `scheme` has no default.

    >>> Recipe(scheme="w4a8").rungs
    ('rtn', 'mse', 'qat')
    """

    scheme: Annotated[Scheme, BeforeValidator(_scheme), _Written]
    task: TaskSettings | None = None
    rules: tuple[Rule, ...] = ()
    untie: bool = Field(
        default=False, description="modules that share a Parameter get one each, so that rules may differ"
    )
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
    smooth: bool = Field(
        default=False,
        description="sizes of channels are balanced between what makes them and what reads them, before "
        "anything is quantized; the float model computes the same bits",
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
