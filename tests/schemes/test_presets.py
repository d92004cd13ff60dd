"""The presets, by the names that the project promises."""

import math
import re
from dataclasses import replace

import pytest

from recoup.numerics import (
    BINARY,
    E2M1,
    E2M3,
    E4M3,
    E8M0,
    FLOAT16,
    FLOAT32,
    MXINT8,
    NF4,
    STRETCHED,
    TERNARY,
    FloatFormat,
    IntFormat,
    per_block,
    per_channel,
    per_group,
    per_tensor,
)
from recoup.schemes import PRESETS, preset
from recoup.schemes.presets import ways_up
from tests.models import name_of

INTEGER = (
    "w8a16 w4a16 w4a8 w3a16 w3a8 w2a16 w2a8 w4a8-ort w2a8-ort w8a8 w8a8-static w8a8-ort w8a8-ort-static "
    "w7a8-ort w7a8-ort-static"
)
FLOAT = (
    "fp8 fp8-static fp8-block w4afp8 mxfp8 mxfp6 mxfp4 mxfp4a16 mxint8 nvfp4 nvfp4a16 nvfp4-2d nvfp4-4over6"
)
GGUF = "q8_0 q8_0a16 q4_0 q4_1 mxfp4-gguf tq2_0"
LEVELS = "nf4 w1a16-seq w1.58a16-seq w2a16-seq"
PROMISED = (*INTEGER.split(), *FLOAT.split(), *GGUF.split(), *LEVELS.split())

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
        family, bits = re.match(r"(fp|mxfp|mxint|nvfp|nf|q|tq|w)([\d.]+)", scheme.name).groups()
        assert scheme.weights.format.bits == math.ceil(float(bits))
        if family in ("fp", "mxfp", "nvfp"):
            assert isinstance(scheme.weights.format, FloatFormat)
        assert (scheme.inputs is None) == ("a16" in scheme.name or family == "nf")
        if scheme.inputs is not None and scheme.name not in GGUF.split():
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
def test_every_weight_can_be_learned(scheme: object) -> None:
    assert replace(scheme.weights, ranges="learned").ranges == "learned"


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
    ("mxint8", per_group(32), MXINT8),
    ("nvfp4", per_group(16), E2M1),
    ("nvfp4-2d", per_block(16, 16), E2M1),
    ("nvfp4-4over6", per_group(16), E2M1),
    ("q8_0", per_group(32), IntFormat(8, narrow=True)),
    ("q4_0", per_group(32), IntFormat(4)),
    ("q4_1", per_group(32), IntFormat(4, signed=False)),
    ("mxfp4-gguf", per_group(32), E2M1),
    ("tq2_0", per_group(256), IntFormat(2, narrow=True)),
    ("nf4", per_group(64), NF4),
    ("w1a16-seq", per_channel, BINARY),
    ("w1.58a16-seq", per_channel, TERNARY),
    ("w2a16-seq", per_channel, STRETCHED),
]


@pytest.mark.parametrize(("name", "granularity", "grid"), LATTICES, ids=[row[0] for row in LATTICES])
def test_lattices(name: str, granularity: object, grid: object) -> None:
    assert (preset(name).weights.granularity, preset(name).weights.format) == (granularity, grid)


@every_preset
def test_scales_are_stored_as_the_family_stores_them(scheme: object) -> None:
    if scheme.name in GGUF.split():
        return
    expected = E8M0 if scheme.name.startswith("mx") else E4M3 if scheme.name.startswith("nv") else None
    for spec in filter(None, (scheme.weights, scheme.inputs)):
        assert spec.global_scale == scheme.name.startswith("nv")
        if expected is not None:
            assert spec.scale_format == expected


# ggml, src/ggml-common.h for the blocks, src/ggml-quants.c for the rules, vec_dot_type of
# src/ggml-cpu/ggml-cpu.c for the inputs. Rule and stored scale of the weights, then columns, rule and stored
# scale of the inputs.
LLAMA_CPP = [
    ("q8_0", "narrow", FLOAT16, 32, "narrow", FLOAT16),
    ("q4_0", "signed-max", FLOAT16, 32, "narrow", FLOAT16),
    ("q4_1", "min-max", FLOAT16, 32, "narrow", FLOAT16),
    ("mxfp4-gguf", "floor", E8M0, 32, "narrow", FLOAT16),
    ("tq2_0", "narrow", FLOAT16, 256, "signed-max", FLOAT32),
]


@pytest.mark.parametrize("row", LLAMA_CPP, ids=lambda row: row[0])
def test_llama_cpps_types_have_the_inputs_of_its_kernels(row: tuple[object, ...]) -> None:
    name, rule, stored, *of_inputs = row
    weights, inputs = preset(name).weights, preset(name).inputs
    assert (weights.scale_rule, weights.scale_format) == (rule, stored)
    assert [inputs.granularity.columns, inputs.scale_rule, inputs.scale_format] == of_inputs
    assert (inputs.format, inputs.ranges) == (IntFormat(8, narrow=True), "dynamic")


@every_preset
def test_a_suffix_changes_the_group_and_nothing_else(scheme: object) -> None:
    name = f"{scheme.name}-g128"
    grouped = isinstance(scheme.weights.format, IntFormat) and scheme.weights.granularity == per_group(32)
    grouped = grouped and scheme.name not in GGUF.split()
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


@every_preset
def test_a_way_up_keeps_the_family_and_has_more_levels(scheme: object) -> None:
    found = [scheme, *ways_up(scheme.name)]
    levels = [2 * one.weights.format.bits + (one.name == "w2a16-seq") for one in found]  # 4 are more than 3
    assert levels == sorted(set(levels))
    assert len({one.inputs is None for one in found}) == 1


def test_a_way_up_keeps_the_size_of_groups() -> None:
    assert [one.name for one in ways_up("w2a16-g64")] == ["w4a16-g64", "w8a16-g64"]
    assert [one.name for one in ways_up("w2a8-g64")] == ["w4a8-g64", "w8a8"]
    assert [one.name for one in ways_up("mxfp4-gguf")] == ["q8_0"]
    assert ways_up("w8a16") == ways_up("a scheme of ones own") == []
