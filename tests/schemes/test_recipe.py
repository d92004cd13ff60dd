"""Recipes: what a user can get wrong reads as one line, and what is right survives being written down."""

from pathlib import Path

import pytest
import torch
import yaml
from pydantic import BaseModel

import recoup
from recoup.numerics import (
    MXINT8,
    TERNARY,
    ElementFormat,
    FloatFormat,
    IntFormat,
    LevelFormat,
    per_group,
)
from recoup.schemes import PRESETS, Limit, Recipe, Rule, Scheme
from tests.models import SCHEMES, recipe

GATE = "scheme: w4a16\ngates: [{metric: perplexity, "
# What stands in the file, and the message after its path.
MISTAKES = {
    "nothing": (b"", "expected keys and values, found NoneType"),
    "comment only": (b"# scheme: w4a16", "expected keys and values, found NoneType"),
    "list": (b"- scheme: w4a16", "expected keys and values, found list"),
    "word": (b"w4a16", "expected keys and values, found str"),
    "open bracket": (b"scheme: [w4a16", "line 1 not YAML: expected ',' or ']', but got '<stream end>'"),
    "two colons": (b"scheme: w4a16\nseed: 1: 2", "line 2 not YAML: mapping values are not allowed here"),
    "tab": (b"scheme:\n\tw4a16", "line 2 not YAML: found character '\\t' that cannot start any token"),
    "control character": (b"scheme: \0", "not YAML: unacceptable character #x0000: special characters are"),
    "python object": (
        b"scheme: !!python/name:os.system",
        "line 1 not YAML: could not determine a constructor",
    ),
    "latin-1": ("scheme: é".encode("latin-1"), "not UTF-8 text at byte 8"),
    "no scheme": (b"seed: 1", "scheme: missing"),
    "key": (b"scheme: w4a16\nrung: [rtn]", "rung: unknown key; did you mean 'rungs'?"),
    "key, the only one needed": (b"schem: w4a16", "schem: unknown key; did you mean 'scheme'?"),
    "key like none": (b"scheme: w4a16\nzzz: 1", "zzz: unknown key; there are scheme, task, rules, "),
    "key of a section": (
        b"scheme: w4a16\ncalibration: {sample: 3}",
        "calibration.sample: unknown key; did you mean 'samples'?",
    ),
    "key of a list": (
        b"scheme: w4a16\nrules: [{match: a, scheme: none}, {mach: b, scheme: none}]",
        "rules.1.mach: unknown key; did you mean 'match'?",
    ),
    "key of train": (
        b"scheme: w4a16\ntrain: {warm_up: 3}",
        "train.warm_up: unknown key; did you mean 'warmup'?",
    ),
    "key of export": (
        b"scheme: w4a16\nexport: {targt: onnx}",
        "export.targt: unknown key; did you mean 'target'?",
    ),
    "key of a gate": (
        b"scheme: w4a16\ngates: [{metrc: a, max_increase: 2%}]",
        "gates.0.metrc: unknown key; did you mean 'metric'?",
    ),
    "key of a limit": (
        f"{GATE}max_increase: {{absolut: 2}}}}]".encode(),
        "gates.0.max_increase.absolut: unknown key; did you mean 'absolute'?",
    ),
    "key that is a number": (b"scheme: w4a16\n1: x", "1: keys should be strings, found 1"),
    "section without a key": (b"scheme: w4a16\ntask: {model: a}", "task.name: missing"),
    "section that is a word": (b"scheme: w4a16\nexport: onnx", "export: input should be a valid dictionary"),
    "section that is empty": (b"scheme: w4a16\ntrain:", "train: input should be a valid dictionary"),
    "rule that is a word": (
        b"scheme: w4a16\nrules: [lm_head]",
        "rules.0: input should be a valid dictionary",
    ),
    "rules that are a mapping": (b"scheme: w4a16\nrules: {a: none}", "rules: input should be a valid tuple"),
    "rule for nothing": (
        b'scheme: w4a16\nrules: [{match: "", scheme: none}]',
        "rules.0.match: string should have at least 1 character",
    ),
    "number that is a word": (
        b"scheme: w4a16\ntrain: {steps: many}",
        "train.steps: input should be a valid int",
    ),
    "number too small": (
        b"scheme: w4a16\ncalibration: {samples: 0}",
        "calibration.samples: input should be greater than or equal to 1, found 0",
    ),
    "not a number": (
        b"scheme: w4a16\ntrain: {learning_rate: .nan}",
        "train.learning_rate: input should be a finite number, found nan",
    ),
    "warm-up to the end": (
        b"scheme: w4a16\ntrain: {steps: 5, warmup: 5}",
        "train: 5 steps leave none after 5 of warm-up and a start at 0",
    ),
    "scheme that is a number": (
        b"scheme: 4",
        "scheme: input should be a dictionary or an instance of Scheme",
    ),
    "scheme": (b"scheme: w4a61", "scheme: no scheme 'w4a61'; did you mean 'w4a16'?"),
    "scheme of two lines": (
        b'scheme: "w4a16\n\n  x"',
        "scheme: no scheme 'w4a16\\nx'; did you mean 'w4a16'?",
    ),
    "scheme of a rule": (
        b"scheme: w4a16\nrules: [{match: a, scheme: nvpf4}]",
        "rules.0.scheme: no scheme 'nvpf4'; did you mean 'nvfp4'?",
    ),
    "none is not a whole recipe": (b"scheme: none", "scheme: no scheme 'none'; "),
    "negative group": (
        b"scheme: w4a16-g-3",
        "scheme: 'w4a16-g-3': a group of -3 asked; a group has at least one",
    ),
    "ranges": (
        b"scheme: w4a16\nweight_ranges: learnt",
        "weight_ranges: input should be 'dynamic', 'static' or 'learned', found 'learnt'",
    ),
    "bare limit": (
        f"{GATE}max_increase: 2}}]".encode(),
        'gates.0.max_increase: a limit is "2%" (of the baseline) or {absolute: 2}, not a bare number',
    ),
    "limit without a unit": (
        f"{GATE}max_increase: '2'}}]".encode(),
        "gates.0.max_increase: '2' is not a limit; write \"2%\" or {absolute: 0.5}",
    ),
    "negative limit": (
        f"{GATE}max_increase: -2%}}]".encode(),
        "gates.0.max_increase.relative: input should be",
    ),
    "limit of both kinds": (
        f"{GATE}max_increase: {{relative: 0.1, absolute: 2}}}}]".encode(),
        'gates.0.max_increase: a limit is either relative ("2%") or {absolute: 0.5}',
    ),
    "gate without a direction": (
        b"scheme: w4a16\ngates: [{metric: a}]",
        "gates.0: a gate has either max_increase",
    ),
    "rungs out of order": (
        b"scheme: w4a16\nrungs: [qat, rtn]",
        "as a whole: rungs go from cheap to dear, each once: a part of rtn, moving-average, percentile, kl, "
        "mse, gptq, bias, qat",
    ),
    "rung twice": (b"scheme: w4a16\nrungs: [rtn, rtn]", "as a whole: rungs go from cheap to dear, each once"),
    "no rung": (b"scheme: w4a16\nrungs: []", "rungs: tuple should have at least 1 item"),
    "rung": (
        b"scheme: w4a16\nrungs: [rtn, qta]",
        "rungs.1: input should be 'rtn', 'moving-average', 'percentile', 'kl', 'mse', 'gptq', 'bias' or "
        "'qat', found 'qta'",
    ),
    "loss": (
        b"scheme: w4a16\ntrain: {loss: distil}",
        "train.loss: no loss 'distil'; did you mean 'distill'?",
    ),
    "loss like none": (
        b"scheme: w4a16\ntrain: {loss: zzz}",
        "train.loss: no loss 'zzz'; there are distill, task, ",
    ),
    "loss in a mixture": (
        b"scheme: w4a16\ntrain: {loss: {task: 0.3, logit-kl: 0.7}}",
        "train.loss: no loss 'logit-kl'; did you mean 'logits-kl'?",
    ),
    "distill in a mixture": (
        b"scheme: w4a16\ntrain: {loss: {distill: 1}}",
        "train.loss: no loss 'distill'; ",
    ),
    "a key twice": (
        b"scheme: w4a16\ntrain: {steps: 5}\nseed: 1\ntrain: {steps: 6}",
        "line 4 not YAML: the key 'train' stands twice; keep one of them",
    ),
    "a key twice in a section": (
        b"scheme: w4a16\ntrain:\n  steps: 5\n  steps: 6",
        "line 4 not YAML: the key 'steps' stands twice; keep one of them",
    ),
    "no patience": (
        b"scheme: w4a16\ntrain: {early_stop: 0}",
        "train.early_stop: input should be greater than or equal to 1, found 0",
    ),
    "no time": (
        b"scheme: w4a16\ntrain: {budget: soon}",
        "train.budget: 'soon' is no time above 0; write 30m, 2h, 90s, or a number of seconds",
    ),
    "time of nothing": (b"scheme: w4a16\ntrain: {budget: 0m}", "train.budget: '0m' is no time above 0; "),
    "time without end": (b"scheme: w4a16\ntrain: {budget: .inf}", "train.budget: inf is no time above 0; "),
    "time that is true": (b"scheme: w4a16\ntrain: {budget: true}", "train.budget: true is no time above 0; "),
    "budget of no training": (
        b"scheme: w4a16\nrungs: [rtn]\ntrain: {budget: 30m}",
        "as a whole: train.budget: 1800 seconds of re-tuning asked, and no rung trains; add qat to rungs, or "
        "leave the budget out",
    ),
    "no loss": (
        b"scheme: w4a16\ntrain: {loss: {}}",
        "train.loss: an empty mixture of losses; there are task, ",
    ),
}


@pytest.mark.parametrize(("written", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line_with_the_file_the_key_and_what_to_write(
    tmp_path: Path, written: bytes, message: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(written)
    with pytest.raises(ValueError, match=r"recipe\.yaml") as error:
        Recipe.load(path)
    place, _, said = str(error.value).partition(": ")
    assert place == str(path)
    assert said.startswith(message)
    assert "\n" not in said


def sections(model: type[BaseModel]) -> list[str]:
    """The sections of a recipe that are models with a default, so that the table below has them all."""
    return [name for name, field in model.model_fields.items() if isinstance(field.default, BaseModel)]


@pytest.mark.parametrize("section", sections(Recipe))
def test_every_section_forbids_unknown_keys(tmp_path: Path, section: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"scheme: w4a16\n{section}: {{zzz: 1}}")
    with pytest.raises(ValueError, match=rf"{section}\.zzz: unknown key; there are "):
        Recipe.load(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Recipe.load(tmp_path / "recipe.yaml")


WHOLE = """
task: {name: causal-lm, model: ./mødel, data: {train: train.jsonl}, max_tokens: 64}
scheme: w4a16-g64
weight_ranges: learned
rules:
  - {match: "lm_head", scheme: none}
  - {match: "*.mlp.down_proj", scheme: w8a16}
calibration: {samples: 64}
rungs: [rtn, qat]
gates:
  - {metric: perplexity, max_increase: 2%}
  - {metric: accuracy, slice: rare, max_decrease: {absolute: 0.5}, interval: none}
train: {steps: 20, learning_rate: 2.0e-5, warmup: 5, loss: {task: 0.3, logits-kl: 0.7}, precision: bf16}
export: {target: onnx, to: out}
seed: 3
"""


def test_a_whole_recipe_reads_as_written(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(WHOLE, encoding="utf-8")
    loaded = Recipe.load(path)
    assert loaded.scheme.weights.granularity.columns == 64
    assert [(rule.match, rule.scheme) for rule in loaded.rules] == [
        ("lm_head", None),
        ("*.mlp.down_proj", PRESETS["w8a16"]),
    ]
    assert loaded.task.settings == {"model": "./mødel", "data": {"train": "train.jsonl"}, "max_tokens": 64}
    assert loaded.gates[0].max_increase == Limit(relative=0.02)
    assert loaded.gates[1].max_decrease == Limit(absolute=0.5)
    assert loaded.train.loss == {"task": 0.3, "logits-kl": 0.7}
    assert (loaded.seed, loaded.calibration.samples, loaded.rungs) == (3, 64, ("rtn", "qat"))
    path.write_text(loaded.dump(), encoding="utf-8")
    assert Recipe.load(path) == loaded


@pytest.mark.parametrize("name", [*PRESETS, "w4a16-g128"])
def test_what_is_dumped_loads_as_equal(tmp_path: Path, name: str) -> None:
    path = tmp_path / "recipe.yaml"
    written = recipe(name, ("a", "none"), ("*.b", name), weight_ranges="learned")
    path.write_text(written.dump(), encoding="utf-8")
    assert Recipe.load(path) == written
    assert Recipe.load(path).dump() == written.dump()


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("30m", 1800.0), ("1.5h", 5400.0), ("90s", 90.0), ("90", 90.0), (90, 90.0), (None, None)],
)
def test_a_budget_is_a_time(written: object, seconds: float | None) -> None:
    given = Recipe.model_validate({"scheme": "w4a16", "train": {"budget": written}})
    assert given.train.budget == seconds
    assert Recipe.model_validate(yaml.safe_load(given.dump())) == given


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        recipe("w4a16").seed = 1


@pytest.mark.parametrize("written", ["2%", "0.1%", "12.5%", "0%", {"absolute": 0.5}, {"absolute": 0}])
def test_a_limit_is_dumped_as_it_was_written(written: object) -> None:
    limit = Limit.model_validate(written)
    assert limit.model_dump() == written
    assert Limit.model_validate(limit.model_dump()) == limit


def test_a_limit_is_a_share_of_the_size_of_the_baseline() -> None:
    assert Limit.model_validate("25%").allowed(baseline=-8.0) == 2.0
    assert Limit.model_validate({"absolute": 0.5}).allowed(baseline=-8.0) == 0.5


def test_the_table_of_schemes_holds_every_preset() -> None:
    assert set(PRESETS) < {scheme.name for scheme in SCHEMES}


def test_a_scheme_of_ones_own_is_written_out_and_read_back(tmp_path: Path) -> None:
    own = Scheme(name="mine", weights=PRESETS["nvfp4"].weights, inputs=PRESETS["w8a8-ort"].inputs)
    written = Recipe(scheme=own, rules=[Rule(match="a", scheme=own)])
    (tmp_path / "recipe.yaml").write_text(written.dump())
    assert Recipe.load(tmp_path / "recipe.yaml") == written
    renamed = Scheme(name="w4a16", weights=own.weights)  # the name of a preset, but not its numbers
    assert Recipe(scheme=renamed).dump() != Recipe(scheme="w4a16").dump()


@pytest.mark.parametrize("limit", ["inf%", "nan%", {"absolute": float("inf")}])
def test_a_limit_is_finite(limit: object) -> None:
    with pytest.raises(ValueError, match="finite"):
        Limit.model_validate(limit)


OWN = """
scheme:
  name: mine
  weights:
    format: {exponent_bits: 3, mantissa_bits: 2}
    granularity: {rows: 1, columns: 24}
    scale_rule: narrow
    ranges: static
"""


def own(tmp_path: Path, old: str = "", new: str = "") -> Recipe:
    assert old in OWN
    (tmp_path / "recipe.yaml").write_text(OWN.replace(old, new) if old else OWN)
    return Recipe.load(tmp_path / "recipe.yaml")


def test_a_format_of_ones_own_needs_no_code(tmp_path: Path) -> None:
    weights = own(tmp_path).scheme.weights
    assert (weights.format, weights.granularity) == (FloatFormat(3, 2), per_group(24))
    model = torch.nn.Sequential(torch.nn.Linear(48, 4))
    recoup.prepare(model, recoup.resolve(model, own(tmp_path)))
    assert model[0].weight_quantizer.scale.shape == (4, 2)
    assert model[0](torch.randn(2, 48)).isfinite().all()


FORMATS = [
    ("{bits: 3, narrow: true}", IntFormat(3, narrow=True)),
    ("{bits: 8, fraction_bits: 6}", MXINT8),
    ("{exponent_bits: 4, mantissa_bits: 2, specials: nan}", FloatFormat(4, 2, specials="nan")),
    ("{count: 3}", TERNARY),
    ("{name: thirds, levels: [-1, 0, 0.5, 1.5], ties: up}", None),
]


@pytest.mark.parametrize(("written", "grid"), FORMATS, ids=[written for written, _ in FORMATS])
def test_every_kind_of_format_is_written_by_its_fields(
    tmp_path: Path, written: str, grid: ElementFormat | None
) -> None:
    grid = grid or LevelFormat("thirds", (-1.0, 0.0, 0.5, 1.5), ties="up")
    assert own(tmp_path, "{exponent_bits: 3, mantissa_bits: 2}", written).scheme.weights.format == grid


MISSPELT = [
    (
        "mantissa_bits",
        "mantisa_bits",
        "scheme.weights.format.mantisa_bits: unknown key; did you mean 'mantissa_bits'?",
    ),
    (", mantissa_bits: 2", "", "scheme.weights.format.mantissa_bits: missing"),
    ("{exponent_bits: 3, mantissa_bits: 2}", "{bits: 12}", "scheme.weights.format: IntFormat: 12 bits asked"),
    ("columns: 24", "column: 24", "scheme.weights.granularity.column: unknown key; did you mean 'columns'?"),
    ("scale_rule", "scale_rules", "scheme.weights.scale_rules: unknown key; did you mean 'scale_rule'?"),
    ("weights:", "weight:", "scheme.weight: unknown key; did you mean 'weights'?"),
    (
        "ranges: static",
        "ranges: static\n    scale_format: {exponent_bits: 4, mantisa_bits: 3}",
        "scheme.weights.scale_format.mantisa_bits: unknown key; did you mean 'mantissa_bits'?",
    ),
    (": narrow", ": affine", 'scheme.weights: e3m2: scale_rule="affine" adds a zero point'),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), MISSPELT, ids=[row[2] for row in MISSPELT])
def test_mistakes_in_a_scheme_of_ones_own(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"recipe\.yaml: scheme") as error:
        own(tmp_path, old, new)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
