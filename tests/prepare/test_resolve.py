"""Every parameter is accounted for before anything is touched; `explain` prints the account."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from recoup import Plan, convert, explain, prepare, resolve
from recoup.numerics import per_group
from recoup.schemes import PRESETS, Scheme, preset
from tests.models import (
    MLP,
    MODELS,
    WIDTH,
    Row,
    Shared,
    Tied,
    every_model,
    every_pair,
    every_refused_pair,
    recipe,
)


def paths(model: nn.Module) -> set[str]:
    """Every parameter, under each of its names."""
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


@every_pair
def test_every_parameter_is_quantized_or_kept_for_a_reason(row: Row, scheme: Scheme) -> None:
    model = row.build()
    plan = resolve(model, scheme)
    assert set(plan.modules) == row.quantized
    assert set(plan.modules.values()) == {scheme.name}
    quantized = {f"{module}.weight" for module in plan.modules}
    assert not quantized & set(plan.kept)
    first_names = {name for name, _ in model.named_parameters()}
    assert first_names <= quantized | set(plan.kept) <= paths(model)
    assert all(plan.kept.values())


@every_refused_pair
def test_what_a_model_cannot_hold_is_refused_in_one_line(row: Row, scheme: Scheme) -> None:
    with pytest.raises(ValueError, match=r"\w") as error:
        resolve(row.build(), scheme)
    assert str(error.value).startswith(row.refused(scheme))
    assert "\n" not in str(error.value)


@every_model
def test_neither_resolve_nor_explain_changes_the_model(row: Row) -> None:
    model = row.build()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    values = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in modules.items()}
    str(explain(model, resolve(model, "w8a8-static")))
    assert all(a is b for a, b in zip(model.modules(), modules.values(), strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters.values(), strict=True))
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes


def test_the_reasons() -> None:
    plan = resolve(Tied(), "w4a16")
    assert plan.kept == {
        "tokens.weight": "tied to lm_head",
        "lm_head.weight": "tied to tokens",
        "positions.weight": "embedding, kept unless a rule names it",
        "block.bias": "bias",
    }
    plan = resolve(MLP(), recipe("w4a16", ("down", "none")))
    assert plan.kept == {
        "up.bias": "bias",
        "norm.weight": "norm",
        "norm.bias": "norm",
        "down.weight": "rule 'down'",
        "head.weight": "head, kept unless a rule names it",
        "head.bias": "head, kept unless a rule names it",
    }
    small = nn.Sequential(nn.Linear(32, 32), nn.PReLU(2))
    assert resolve(small, "w4a16").kept["1.weight"].startswith("no quantized form of torch.nn.")


def test_the_first_rule_that_matches_wins() -> None:
    both = (("*", "w8a16"), ("up", "none"))
    assert resolve(MLP(), recipe("w4a16", *both)).modules["up"] == "w8a16"
    assert "up" not in resolve(MLP(), recipe("w4a16", *both[::-1])).modules


def test_a_rule_quantizes_what_is_otherwise_kept() -> None:
    plan = resolve(MLP(), recipe("w4a8", ("head", "w8a16")))
    assert plan.modules == {"up": "w4a8", "down": "w4a8", "head": "w8a16"}
    assert plan.kept["head.bias"] == "bias"
    plan = resolve(Tied(), recipe("w4a8", ("positions", "w8a16")))
    assert plan.modules == {"positions": "w8a16", "block": "w4a8"}


def test_a_rule_by_the_name_of_what_is_around() -> None:
    model = MODELS[1].build()
    plan = resolve(model, recipe("w4a16", ("encoder.layer.*.attention", "w8a16"), ("pooler", "none")))
    attention = {name for name, scheme in plan.modules.items() if scheme == "w8a16"}
    assert attention == {name for name in plan.modules if ".attention." in name}
    assert len(attention) == 4
    assert plan.kept["pooler.dense.weight"] == "rule 'pooler'"
    assert plan.kept["encoder.layer.0.attention.output.LayerNorm.weight"] == "norm"


def test_learned_ranges_are_the_weights() -> None:
    plan = resolve(MLP(), recipe("w8a8-static", weight_ranges="learned"))
    assert plan["up"] == replace(
        PRESETS["w8a8-static"], weights=replace(PRESETS["w8a8-static"].weights, ranges="learned")
    )


def test_a_recipe_a_scheme_and_its_name_are_one() -> None:
    assert resolve(MLP(), "w4a16") == resolve(MLP(), preset("w4a16")) == resolve(MLP(), recipe("w4a16"))


def bilinear() -> nn.Module:
    return nn.Sequential(nn.Bilinear(8, 8, 8), nn.Bilinear(8, 8, 4), nn.Flatten(), nn.Linear(32, 32))


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x, x, x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = SelfAttention(32, 2)
        self.output = nn.Linear(32, 32)


class Places(nn.Module):
    """With a large parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(4, 32))
        self.output = nn.Linear(32, 32)


class NormedProduct(nn.Module):
    """A matrix product, whatever its name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32))


def named_norm() -> nn.Module:
    return nn.Sequential(NormedProduct(), nn.Linear(32, 32))


def weight_normed() -> nn.Module:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    nn.utils.parametrizations.weight_norm(model[0])
    return model


def pruned() -> nn.Module:
    from torch.nn.utils import prune

    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


LARGE = {
    bilinear: "0.weight (8 x 8 x 8, no quantized form of torch.nn.modules.linear.Bilinear); 1.weight",
    Attention: "attention.in_proj_weight (96 x 32, no quantized form of tests.prepare.test_resolve.SelfAtt",
    Places: "places (4 x 32, no quantized form of tests.prepare.test_resolve.Places)",
    named_norm: "0.weight (32 x 32, norm)",
    weight_normed: "0.parametrizations.weight.original1 (32 x 32, no quantized form of ",
    pruned: "0.weight_orig (32 x 32, no quantized form of torch.nn.modules.linear.Linear)",
}


@pytest.mark.parametrize(("build", "found"), LARGE.items(), ids=[build.__name__ for build in LARGE])
def test_a_large_parameter_is_never_left_out_silently_and_the_advice_keeps_it(
    build: type[nn.Module], found: str
) -> None:
    model = build()
    with pytest.raises(ValueError, match="of the matrices would stay in float") as error:
        resolve(model, "w4a16")
    assert found in str(error.value)
    rules = []
    while error is not None:
        advice = str(error.value).partition("{match: ")[2].partition(", scheme: none}")[0]
        rules.append((advice, "none"))
        assert len(rules) <= 2
        try:
            plan = resolve(model, recipe("w4a16", *rules))
            error = None
        except ValueError:
            with pytest.raises(ValueError, match="of the matrices would stay in float") as error:
                resolve(model, recipe("w4a16", *rules))
    assert len(plan.modules) == 1
    assert all(name in plan.kept or name.endswith("weight") for name, _ in model.named_parameters())
    assert f"rule {rules[0][0]!r}" in plan.kept.values()


@pytest.mark.parametrize(
    ("asked", "found"), [("w4a61", "no scheme 'w4a61'; did you mean 'w4a16'?"), (4, "4")]
)
def test_a_scheme_that_is_none_is_one_line(asked: Any, found: str) -> None:
    with pytest.raises(ValueError, match=r"^resolve: scheme: ") as error:
        resolve(nn.Sequential(nn.Linear(32, 4)), asked)
    assert found in str(error.value)
    assert "\n" not in str(error.value)


def test_many_large_parameters_make_a_short_message() -> None:
    model = nn.Sequential(nn.Linear(32, 32), *(nn.Bilinear(4, 4, 8) for _ in range(5)))
    with pytest.raises(
        ValueError, match=r"^38% of the matrices .*1\.weight .*3\.weight .*; and 2 more\. Keep"
    ):
        resolve(model, "w4a16")


def test_what_can_be_quantized_is_in_the_message() -> None:
    with pytest.raises(ValueError, match="of the matrices would stay in float") as error:
        resolve(bilinear(), "w4a16")
    kinds = "nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, "
    kinds += "nn.ConvTranspose3d, nn.Embedding, nn.EmbeddingBag, "
    kinds += "nn.LSTM, nn.GRU, nn.MultiheadAttention, transformers.pytorch_utils.Conv1D, "
    kinds += "transformers.models.falcon.modeling_falcon.FalconLinear, "
    kinds += "subclasses of linear layers and convolutions, and layers of experts, with weights of their own"
    advice = "Keep them knowingly with rules such as {match: 0, scheme: none}; quantized can be "
    assert str(error.value).endswith(f"{advice}{kinds}")
    with pytest.raises(ValueError, match=r"^rule '0' matches only modules without a quantized form") as error:
        resolve(bilinear(), recipe("w4a16", ("0", "w8a16")))
    assert str(error.value).endswith(f"Bilinear; there is one of {kinds}")


def test_the_models_own_parameter_is_matched_by_its_name() -> None:
    plan = resolve(Places(), recipe("w4a16", ("places", "none")))
    assert plan.modules == {"output": "w4a16"}
    assert plan.kept == {"places": "rule 'places'", "output.bias": "bias"}


def narrow() -> nn.Module:
    return nn.ModuleDict({"wide": nn.Linear(64, 32), "narrow": nn.Linear(12, 32)})


MISTAKES = {
    "a group that does not divide": (
        narrow,
        "w4a16",
        "narrow: 12 columns cannot be cut into groups of 32; use per_channel, or a group size among "
        "[2, 3, 4, 6, 12]",
    ),
    "a group of inputs that does not divide": (
        narrow,
        Scheme(
            name="mine",
            weights=PRESETS["w8a8"].weights,
            inputs=replace(PRESETS["w8a8"].inputs, granularity=per_group(64)),
        ),
        "narrow: 12 columns cannot be cut into groups of 64; use per_channel",
    ),
    "a tile that does not divide": (
        lambda: nn.Sequential(nn.Linear(128, 6)),
        "fp8-block",
        "0: 6 rows cannot be cut into groups of 128; use per_channel, or a group size among [2, 3, 6]",
    ),
    "a rule for nothing": (
        MLP,
        recipe("w4a16", ("dwn", "none")),
        "rule 'dwn' matches no module; did you mean down?",
    ),
    "a rule like nothing": (
        MLP,
        recipe("w4a16", ("zzz", "none")),
        "rule 'zzz' matches no module; modules are named as 'up'",
    ),
    "the second of two rules for nothing": (
        MLP,
        recipe("w4a16", ("*", "w4a16"), ("heads", "none")),
        "rule 'heads' matches no module; did you mean head?",
    ),
    "a rule for a norm": (
        MLP,
        recipe("w4a16", ("norm", "w8a16")),
        "rule 'norm' matches only modules without a quantized form: torch.nn.modules.normalization.LayerNorm",
    ),
    "a rule for tied weights": (
        Tied,
        recipe("w4a16", ("lm_head", "w8a16")),
        "lm_head: its weight is tied to that of tokens, which stays in float; write {match: tokens, scheme: "
        "w8a16} to quantize both alike, write untie: true (recoup.transforms.untie) to give each its own, "
        "or keep both in float with scheme: none",
    ),
    "inputs of an embedding": (
        Tied,
        recipe("w4a16", ("positions", "w8a8")),
        "positions: 'w8a8' quantizes inputs, but an embedding's are ids; use w8a16 or w4a16",
    ),
    "two schemes of one name": (
        narrow,
        recipe("w8a8", ("narrow", replace(preset("w8a8"), inputs=None))),
        "two different schemes are called 'w8a8'; give them two names",
    ),
    "only a head": (
        lambda: nn.ModuleDict({"head": nn.Linear(32, 4)}),
        "w4a16",
        "nothing to quantize: every module is kept (head, kept unless a rule names it)",
    ),
    "all kept": (MLP, recipe("w4a16", ("*", "none")), "nothing to quantize: every module is kept (rule '*')"),
    "no parameters": (nn.ReLU, "w4a16", "nothing to quantize: no parameters"),
}


@pytest.mark.parametrize(("build", "given", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_leave_the_model_as_it_was(build: type[nn.Module], given: object, message: str) -> None:
    model = build()
    before = list(model.modules())
    with pytest.raises(ValueError, match=r".") as error:
        resolve(model, given)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))


@pytest.mark.parametrize("name", ["w4a16", "w8a8"])
def test_a_model_is_resolved_only_once(name: str) -> None:
    model = MLP()
    prepare(model, resolve(model, name))
    for change in (lambda model: model, convert):
        with pytest.raises(
            ValueError, match="the model is prepared already; resolve looks at the float model"
        ):
            resolve(change(model), name)


def test_a_shared_module_is_one() -> None:
    plan = resolve(Shared(), recipe("w4a16", ("first", "w8a16")))
    assert plan.modules == {"first": "w8a16", "later.0": "w4a16"}


# By hand, for MLP with WIDTH x WIDTH twice: bytes of codes, scales and the global scale of one weight.
BYTES = {
    "w4a16": WIDTH * WIDTH // 2 + WIDTH * WIDTH // 32 * 4,
    "w4a16-g128": WIDTH * WIDTH // 2 + WIDTH * WIDTH // 128 * 4,
    "w3a16": WIDTH * WIDTH * 3 // 8 + WIDTH * WIDTH // 32 * 4,
    "w8a8": WIDTH * WIDTH + WIDTH * 4,
    "fp8-static": WIDTH * WIDTH + 4,
    "fp8-block": WIDTH * WIDTH + WIDTH * WIDTH // 128**2 * 4,
    "mxfp4": WIDTH * WIDTH // 2 + WIDTH * WIDTH // 32,
    "nvfp4": WIDTH * WIDTH // 2 + WIDTH * WIDTH // 16 + 4,
    "q4_1": WIDTH * WIDTH // 2 + WIDTH * WIDTH // 32 * 4,
    "tq2_0": WIDTH * WIDTH // 4 + WIDTH * WIDTH // 256 * 2,
}
KEPT = WIDTH + 2 * WIDTH + 3 * WIDTH + 3  # up.bias, norm, head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BYTES)
def test_explained_bytes_are_those_by_hand(name: str, dtype: torch.dtype) -> None:
    model = MLP().to(dtype)
    found = explain(model, resolve(model, name))
    rows = {row.parameter: row for row in found.rows}
    assert list(rows) == [path for path, _ in model.named_parameters()]
    for path in ("up.weight", "down.weight"):
        row = rows[path]
        assert (row.scheme, row.shape, row.reason) == (name, (WIDTH, WIDTH), "")
        assert row.bytes_before == WIDTH * WIDTH * dtype.itemsize
        assert row.bytes_after == BYTES[name]
        assert row.bits == 8 * BYTES[name] / WIDTH**2
    assert {row.bits for path, row in rows.items() if row.scheme == "float"} == {8 * dtype.itemsize}
    assert found.bytes_before == (2 * WIDTH**2 + KEPT) * dtype.itemsize
    assert found.bytes_after == 2 * BYTES[name] + KEPT * dtype.itemsize
    total = str(found).splitlines()[-1].split()
    bits = 8 * found.bytes_after / (2 * WIDTH**2 + KEPT)
    assert total == ["total", f"{bits:.1f}", f"{found.bytes_before:,}", f"{found.bytes_after:,}"]


@every_model
def test_explain_has_a_line_for_every_parameter_and_counts_tied_ones_once(row: Row) -> None:
    model = row.build()
    plan = resolve(model, "w8a8-static")
    found = explain(model, plan)
    assert [line.parameter for line in found.rows] == [path for path, _ in model.named_parameters()]
    assert found.bytes_before == 4 * sum(parameter.numel() for parameter in model.parameters())
    for line in found.rows:
        assert bool(line.reason) == (line.scheme == "float")
        assert line.reason == plan.kept.get(line.parameter, "")
    assert len(str(found).splitlines()) == len(found.rows) + 2


def test_a_plan_is_data_that_another_process_can_carry_out() -> None:
    plan = resolve(MLP(), "w4a16")
    model = prepare(MLP(), Plan.from_json(plan.to_json()))
    assert model.up.scheme == PRESETS["w4a16"]
