"""Plans and schemes as data."""

import json
from dataclasses import replace

import pytest

from recoup.numerics import per_token
from recoup.schemes import PRESETS, Plan, Scheme, preset
from tests.models import SCHEMES, every_scheme


@every_scheme
@pytest.mark.parametrize("ranges", ["dynamic", "static", "learned"])
def test_a_plan_survives_json(scheme: Scheme, ranges: str) -> None:
    scheme = replace(scheme, weights=replace(scheme.weights, ranges=ranges, gradient="pass-through"))
    plan = Plan(schemes={scheme.name: scheme}, modules={"a.b": scheme.name}, kept={"a.c": "norm"})
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert type(again["a.b"].weights.scale_format) is type(scheme.weights.scale_format)
    assert type(again["a.b"].weights.format) is type(scheme.weights.format)


def test_all_schemes_in_one_plan_survive_json() -> None:
    schemes = {scheme.name: scheme for scheme in SCHEMES}
    plan = Plan(schemes=schemes, modules={name: name for name in schemes})
    assert Plan.from_json(plan.to_json()) == plan


MISTAKES = [
    ([], "not a plan: "),
    ("w4a16", "not a plan: "),
    ({"modules": {"a": 3}}, "not a plan: modules.a: "),
    ({"schemes": {"w4a16": {"name": "w4a16"}}}, "not a plan: schemes.w4a16.weights: "),
    ({"modules": {"a": "w4a16"}}, "a: no scheme 'w4a16' among the plan's"),
]


@pytest.mark.parametrize(("data", "message"), MISTAKES, ids=str)
def test_what_is_not_a_plan(data: object, message: str) -> None:
    with pytest.raises(ValueError, match="plan") as error:
        Plan.from_json(data)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ranges", ["static", "learned"])
def test_no_scales_per_token_for_inputs_that_are_not_dynamic(ranges: str) -> None:
    inputs = replace(PRESETS["w8a8"].inputs, ranges=ranges)
    assert inputs.granularity == per_token
    message = f"scheme 'mine': {ranges} input ranges cannot have scales per token; use per_tensor, or dynamic"
    with pytest.raises(ValueError, match=message):
        Scheme(name="mine", weights=PRESETS["w8a8"].weights, inputs=inputs)


# By hand: bits of a code, bits of a scale (and zero point) over the elements that share it, and for NVFP4
# one float32 per tensor.
STORED = [
    ("w4a16", (4, 64), 4 + 32 / 32),
    ("w4a16-g64", (4, 64), 4 + 32 / 64),
    ("w3a16", (4, 64), 3 + 32 / 32),
    ("w8a8", (4, 64), 8 + 32 / 64),
    ("fp8-static", (4, 64), 8 + 32 / 256),
    ("fp8-block", (128, 128), 8 + 32 / 128**2),
    ("mxfp4", (4, 64), 4 + 8 / 32),
    ("mxfp6", (4, 64), 6 + 8 / 32),
    ("nvfp4", (4, 64), 4 + 8 / 16 + 32 / 256),
]


@pytest.mark.parametrize(("name", "shape", "bits"), STORED, ids=[row[0] for row in STORED])
def test_stored_bits(name: str, shape: tuple[int, int], bits: float) -> None:
    assert preset(name).bits_per_weight(*shape) == bits


def test_stored_bits_of_a_zero_point() -> None:
    affine = next(scheme for scheme in SCHEMES if scheme.weights.scale_rule == "affine")
    assert affine.bits_per_weight(4, 64) == 4 + (32 + 4) / 32
