"""The presets, by the names that the project promises."""

import re

import pytest

from recoup.numerics import E2M1, E2M3, E4M3, E8M0, FloatFormat, IntFormat, per_channel, per_group, per_tensor
from recoup.schemes import PRESETS, preset
from tests.models import name_of

INTEGER = "w8a16 w4a16 w4a8 w3a16 w3a8 w2a16 w2a8 w4a8-ort w2a8-ort w8a8 w8a8-static w8a8-ort w8a8-ort-static"
FLOAT = "fp8 fp8-static fp8-block w4afp8 mxfp8 mxfp6 mxfp4 mxfp4a16 nvfp4 nvfp4a16"
PROMISED = (*INTEGER.split(), *FLOAT.split())

every_preset = pytest.mark.parametrize("scheme", PRESETS.values(), ids=name_of)


def test_the_presets_are_the_promised_ones() -> None:
    assert sorted(PRESETS) == sorted(PROMISED)


@every_preset
def test_a_name_is_its_scheme(scheme: object) -> None:
    assert preset(scheme.name) is scheme


@every_preset
def test_a_name_says_the_bits(scheme: object) -> None:
    said = re.fullmatch(r"w(\d)a(fp)?(\d+)(-ort)?(-static)?", scheme.name)
    if said is None:
        assert re.match(r"(fp|mxfp|nvfp)\d", scheme.name)
        bits = int(re.search(r"fp(\d)", scheme.name)[1])
        assert isinstance(scheme.weights.format, FloatFormat)
        assert scheme.weights.format.bits == bits
        assert (scheme.inputs is None) == scheme.name.endswith("a16")
        if scheme.inputs is not None:
            assert scheme.inputs.format == scheme.weights.format
        return
    weights, is_float, inputs = int(said[1]), said[2], int(said[3])
    assert isinstance(scheme.weights.format, IntFormat)
    assert scheme.weights.format.bits == weights
    assert (scheme.inputs is None) == (inputs == 16)
    if scheme.inputs is not None:
        assert scheme.inputs.format.bits == inputs
        assert isinstance(scheme.inputs.format, FloatFormat if is_float else IntFormat)


@every_preset
def test_a_static_name_has_static_inputs_and_every_weight_is_static(scheme: object) -> None:
    assert scheme.weights.ranges == "static"
    if scheme.inputs is not None:
        assert (scheme.inputs.ranges == "static") == scheme.name.endswith("-static")


LATTICES = [
    ("w4a16", per_group(32), IntFormat(4)),
    ("w4a8-ort", per_group(32), IntFormat(4)),
    ("w8a16", per_group(32), IntFormat(8)),
    ("w8a8", per_channel, IntFormat(8, narrow=True)),
    ("w8a8-ort", per_channel, IntFormat(8, narrow=True)),
    ("fp8", per_channel, E4M3),
    ("fp8-static", per_tensor, E4M3),
    ("mxfp8", per_group(32), E4M3),
    ("mxfp6", per_group(32), E2M3),
    ("mxfp4", per_group(32), E2M1),
    ("nvfp4", per_group(16), E2M1),
]


@pytest.mark.parametrize(("name", "granularity", "grid"), LATTICES, ids=[row[0] for row in LATTICES])
def test_lattices(name: str, granularity: object, grid: object) -> None:
    assert (preset(name).weights.granularity, preset(name).weights.format) == (granularity, grid)


@every_preset
def test_scales_are_stored_as_the_family_stores_them(scheme: object) -> None:
    expected = E8M0 if scheme.name.startswith("mx") else E4M3 if scheme.name.startswith("nv") else None
    for spec in filter(None, (scheme.weights, scheme.inputs)):
        assert spec.global_scale == scheme.name.startswith("nv")
        if expected is not None:
            assert spec.scale_format == expected


@every_preset
def test_a_suffix_changes_the_group_and_nothing_else(scheme: object) -> None:
    name = f"{scheme.name}-g128"
    grouped = isinstance(scheme.weights.format, IntFormat) and scheme.weights.granularity == per_group(32)
    if not grouped:
        with pytest.raises(
            ValueError, match=f"'{name}': the blocks of '{scheme.name}' are part of its format"
        ):
            preset(name)
        return
    changed = preset(name)
    assert changed.name == name
    assert changed.weights.granularity == per_group(128)
    fields = [field for field in vars(scheme.weights) if field != "granularity"]
    assert all(getattr(changed.weights, f) == getattr(scheme.weights, f) for f in fields)
    if scheme.name.endswith("-ort"):  # onnxruntime's input blocks are as long as the weight's
        assert changed.inputs.granularity == per_group(128)
    else:
        assert changed.inputs == scheme.inputs


MISTAKES = [
    ("w4a61", "no scheme 'w4a61'; did you mean 'w4a16'?"),
    ("nvpf4", "no scheme 'nvpf4'; did you mean 'nvfp4'?"),
    ("W4A16", "no scheme 'W4A16'; did you mean 'w4a16'?"),
    ("", "no scheme ''; there are w2a16, w3a16, "),
    ("w4a61-g128", "no scheme 'w4a61-g128'; did you mean 'w4a16'?"),
    ("w4a16-g", "no scheme 'w4a16-g'; did you mean 'w4a16'?"),
    ("w4a16-g-3", "'w4a16-g-3': a group of -3 asked; a group has at least one element"),
    ("w4a16-g0", "'w4a16-g0': a group of 0 asked; a group has at least one element"),
]


@pytest.mark.parametrize(("name", "message"), MISTAKES)
def test_mistakes(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"scheme|group") as error:
        preset(name)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
