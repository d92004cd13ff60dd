"""Every place where two careful implementations of one lattice come apart, and the test that holds it.

Read TRAPS first: it says where each is tested. What follows are those that no other file has.
"""

import ast
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from recoup import calibrate, prepare, resolve
from recoup.numerics import (
    E2M1,
    E4M3,
    E5M2,
    E8M0,
    FloatFormat,
    IntFormat,
    QParams,
    QuantSpec,
    choose_global_scale,
    fake_quantize,
    per_channel,
    per_tensor,
    qparams_of,
    quantize,
    storable,
)

from .inputs import drawn
from .tables import INTS, NVFP4, SPECS, bits, over, sample

TESTS = Path(__file__).parent.parent
HERE = "numerics/test_traps.py"
TRAPS: dict[str, tuple[str, ...]] = {
    "divide, or multiply by the reciprocal": (
        "numerics/test_affine_oracles.py::test_divide_or_multiply",
        "numerics/test_torchao_integer_oracles.py::test_scales_zero_points_and_codes",
        "numerics/test_nvfp4_oracles.py::test_torchaos_reciprocal_moves_ties_and_nothing_else",
    ),
    "zero point before or after rounding": (
        "numerics/test_affine_oracles.py::test_zero_point_is_added_after_rounding",
        "numerics/test_compressed_tensors_oracles.py::test_integers_with_a_zero_point_but_for_its_place",
        "numerics/test_compressed_tensors_oracles.py::test_its_zero_point_is_rounded_after_the_subtraction",
        f"{HERE}::test_ties_with_an_odd_zero_point",
    ),
    "all that is called symmetric int4: amax / 7.5, / 7, max / -8": (
        "numerics/test_scales.py::test_rules_by_hand",
        "numerics/test_scales.py::test_signed_max_puts_the_largest_value_on_the_lowest_code",
        "numerics/test_gguf_oracles.py::test_the_stored_scale_is_ggmls",
    ),
    "codes decided in the dtype of the weight": (
        "numerics/test_compressed_tensors_oracles.py"
        "::test_codes_in_half_precision_are_decided_on_rounded_quotients",
        "numerics/test_quantize.py::test_the_dtype_does_not_decide",
        "numerics/test_torchao_integer_oracles.py::test_in_half_precision_it_decides_on_rounded_products",
        f"{HERE}::test_bfloat16_float16_and_float32_inputs_give_the_same_codes",
        f"{HERE}::test_rounding_to_bfloat16_first_moves_what_is_next_to_a_tie",
    ),
    "four MX scale rules, at every threshold and one ulp to each side": (
        "numerics/test_scales.py::test_mx_exponents",
        "numerics/test_scales.py::test_mx_thresholds_by_hand",
        "numerics/test_mx_oracles.py::test_torchao_at_every_code_point",
    ),
    "amax at the edge of a binade": (
        "numerics/test_mx_oracles.py::test_torchaos_rceil_rounds_down_where_its_logarithm_does",
        "numerics/test_gguf_mxfp4_oracles.py::test_its_logarithm_rounds_up_below_a_power_of_two",
    ),
    "the threshold of EVEN is the element's": (
        "numerics/test_compressed_tensors_oracles.py::test_mxfp8_takes_the_threshold_of_fp4",
    ),
    "the smallest E8M0 scale, and its NaN": (
        "numerics/test_mx_oracles.py::test_torchao_divides_by_another_number_where_the_scale_is_its_smallest",
        "numerics/test_mx_oracles.py::test_torchao_stores_nan_as_255_and_infinity_as_a_number",
        f"{HERE}::test_no_scale_is_the_nan_of_e8m0",
    ),
    "the NVFP4 global scale is stored as its reciprocal": (
        "numerics/test_nvfp4_oracles.py::test_the_global_scale_is_torchaos_and_compressed_tensors_reciprocal",
        "numerics/test_nvfp4_oracles.py::test_the_exported_global_scale_is_a_divisor",
        "numerics/test_nvfp4_oracles.py::test_a_divisor_read_back_as_a_multiplier_is_off_by_an_ulp_at_most",
    ),
    "the smallest NVFP4 block scale": (
        "numerics/test_nvfp4_oracles.py::test_smallest_block_scales_of_the_engines",
        "numerics/test_scales.py::test_tiny_block_beside_a_huge_one_takes_the_floor",
    ),
    "block scales under- and overflow": (
        f"{HERE}::test_blocks_a_million_and_a_billion_times_apart",
        f"{HERE}::test_a_block_that_outgrew_the_calibrated_global_scale_saturates",
    ),
    "ties of E2M1": (
        "numerics/test_formats.py::test_e2m1_ties",
        "numerics/test_gguf_mxfp4_oracles.py::test_it_is_the_rule_floor_with_ties_toward_zero",
        f"{HERE}::test_ties_of_modelopts_mxfp4_packer_go_toward_zero",
    ),
    "FP8 past its range": (f"{HERE}::test_fp8_past_its_range",),
    "blocks of zeros": (
        "numerics/test_scales.py::test_zero_is_exact",
        "numerics/test_mx_oracles.py::test_a_block_of_zeros_has_scale_1_here_and_the_smallest_in_torchao",
        "numerics/test_compressed_tensors_oracles.py"
        "::test_a_block_of_zeros_has_scale_1_here_and_epsilon_there",
    ),
    "-0": (
        f"{HERE}::test_negative_zero_keeps_its_sign_in_floats_and_loses_it_in_integers",
        "numerics/test_compressed_tensors_oracles.py::test_a_negative_zero_loses_its_sign_in_its_e2m1_only",
    ),
    "infinity and NaN": (
        f"{HERE}::test_what_is_not_finite_is_an_error_that_names_the_tensor",
        "nn/test_modules.py::test_a_range_must_be_finite",
        "convert/test_convert.py::test_a_weight_that_training_broke_is_refused",
    ),
    "float16 scales": (
        "numerics/test_gguf_oracles.py::test_codes_differ_where_ggmls_formula_says_so_and_nowhere_else",
        "numerics/test_gguf_oracles.py"
        "::test_what_lies_on_our_lattice_passes_through_ggmls_quantizer_unchanged",
        "numerics/test_scales.py::test_float16_scales_do_not_underflow",
    ),
    "a group size that does not divide": (
        "numerics/test_errors.py::test_mistakes",
        "prepare/test_resolve.py::test_what_a_model_cannot_hold_is_refused_in_one_line",
    ),
    "packing 2 to 8 bits": (
        "numerics/test_compressed_tensors_oracles.py::test_packed_by_the_exporter_and_unpacked",
        "export/test_compressed_tensors.py::test_another_decoder_reads_the_trained_weights",
        "export/test_onnx.py::test_the_bytes_hold_the_codes_and_scales_of_convert",
        "numerics/test_compressed_tensors_oracles.py::test_the_bytes_of_its_mx_compressors_are_our_codes",
    ),
    "a session quantizes inputs that training left in float": (
        "export/test_onnx.py::test_inputs_that_training_left_in_float_stay_in_float",
        "export/test_onnx.py::test_integer_products_do_not_saturate",
    ),
    "an offset in place of a zero point": (
        "numerics/test_gguf_oracles.py::test_q4_1_has_a_scale_and_an_offset_and_rounds_half_up",
    ),
    "a table of levels with four decimals": (
        "numerics/test_nf4_oracles.py::test_four_decimals_move_what_is_between_two_midpoints",
    ),
    "tied tensors": (
        "prepare/test_tied.py::test_quantized_they_have_one_quantizer_and_then_one_set_of_codes",
    ),
    "fused siblings share a scale": (
        "export/test_compressed_tensors_refusals.py::test_fused_siblings_share_the_largest_global_scale",
        "export/test_compressed_tensors_refusals.py::test_global_scales_that_differ_are_refused",
    ),
}


def test_every_trap_has_its_tests() -> None:
    names = [name.split("::") for tests in TRAPS.values() for name in tests]
    for file in {file for file, _ in names}:
        tree = ast.parse((TESTS / file).read_text())
        there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert {function for other, function in names if other == file} <= there, file


# --- ties -------------------------------------------------------------------------------------------------


@over("grid", INTS)
def test_ties_with_an_odd_zero_point(grid: IntFormat) -> None:
    spec = QuantSpec(format=grid, granularity=per_channel, scale_rule="affine", ranges="static")
    ties = torch.arange(grid.lo, grid.hi) + 0.5
    odd = range(int(grid.lo) + 1 - int(grid.lo) % 2, int(grid.hi), 2)
    for zero in {odd[0], odd[len(odd) // 2], odd[-1]}:
        qparams = QParams(scale=torch.ones(1, 1), zero_point=torch.tensor([[zero]], dtype=torch.int32))
        codes = quantize(ties[None] - zero, qparams, spec)[0].float()
        after = (torch.round(ties - zero) + zero).clamp(grid.lo, grid.hi)
        before = torch.round(ties).clamp(grid.lo, grid.hi)  # rint(x / s + zero point), of other engines
        assert torch.equal(codes, after)
        assert zero % 2 == 1
        assert (codes != before).all()


def test_ties_of_modelopts_mxfp4_packer_go_toward_zero() -> None:
    """ModelOpt 0.47, mxfp4_tensor.py lines 47 to 52: it counts the bounds below |x|; 0 gets the sign bit."""
    bounds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    x = torch.cat([bounds, -bounds, torch.arange(-600, 601) / 100, torch.tensor([-0.0])])
    theirs = (x.abs()[:, None] > bounds).sum(1) + 8 * (x <= 0)
    ours = E2M1.encode(E2M1.rint(x))
    tie = torch.isin(x.abs(), torch.tensor([0.75, 1.75, 3.5]))
    plus_zero = (x == 0) & ~x.signbit()
    assert torch.equal(theirs != ours, tie | plus_zero)
    assert torch.equal(theirs[tie], ours[tie] - 1)


def test_rounding_to_bfloat16_first_moves_what_is_next_to_a_tie() -> None:
    """Rounded twice, a value just short of a tie arrives on it and goes to even; rounded once it does not."""
    ties, even = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]])
    x = (ties[:, None] * (1 + torch.arange(-256, 257) * 2.0**-16)).flatten()
    even, ties = even.repeat_interleave(513), ties.repeat_interleave(513)
    far_side = torch.where(even > ties, x < ties, x > ties)
    moved = E2M1.rint(x) != E2M1.rint(x.bfloat16().float())
    assert torch.equal(moved, (x.bfloat16() == ties) & far_side)
    assert moved.any()
    spec = QuantSpec(format=E2M1, granularity=per_channel, scale_rule="narrow", ranges="static")
    codes = quantize(x[None], QParams(scale=torch.ones(1, 1)), spec)[0]
    assert torch.equal(E2M1.decode(codes), E2M1.rint(x))


# --- special values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "dtype", "scalar", "first_lost", "beyond"),
    [
        (
            E4M3,
            torch.float8_e4m3fn,
            ml_dtypes.float8_e4m3fn,
            464.00003,
            [448.0, 464.0, 464.00003, 480.0, 1e9],
        ),
        (
            E5M2,
            torch.float8_e5m2,
            ml_dtypes.float8_e5m2,
            61440.0,
            [57344.0, 61439.996, 61440.0, 65536.0, 1e9],
        ),
    ],
    ids=["e4m3", "e5m2"],
)
def test_fp8_past_its_range(
    grid: FloatFormat, dtype: torch.dtype, scalar: type, first_lost: float, beyond: list[float]
) -> None:
    """We saturate, infinity too. ml_dtypes gives NaN or infinity; torch's casts differ by version."""
    x = torch.tensor([*beyond, torch.inf])
    spec = QuantSpec(format=grid, granularity=per_tensor, scale_rule="narrow", ranges="static")
    one = QParams(scale=torch.ones(1, 1))
    for sign in (1, -1):
        assert (fake_quantize(sign * x[None], one, spec) == sign * grid.hi).all()
    lost = x >= first_lost
    with np.errstate(over="ignore", invalid="ignore"):
        theirs = torch.tensor(x.numpy().astype(scalar).astype(np.float32))
    assert torch.equal(~theirs.isfinite(), lost)
    torchs = x.to(dtype).float()
    assert ((torchs == grid.hi) | ~torchs.isfinite()).all()
    assert (torchs == grid.hi)[~lost].all()
    if grid == E5M2:
        assert torch.equal(~torchs.isfinite(), lost)
    assert torch.isnan(fake_quantize(torch.tensor([[torch.nan]]), one, spec)).all()


@over("spec", SPECS)
def test_negative_zero_keeps_its_sign_in_floats_and_loses_it_in_integers(spec: QuantSpec) -> None:
    x = sample()
    x[:, ::4] = -0.0
    qparams = qparams_of(x, spec)
    codes = quantize(x, qparams, spec)[:, ::4]
    values = fake_quantize(x, qparams, spec)[:, ::4]
    if isinstance(spec.format, FloatFormat) and not spec.has_offset:
        assert (codes == 2 ** (spec.format.bits - 1)).all()
        assert (values == 0).all()
        assert values.signbit().all()
    else:
        assert torch.equal(codes, quantize(x + 0.0, qparams, spec)[:, ::4])
        assert torch.equal(values, fake_quantize(x + 0.0, qparams, spec)[:, ::4])


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("name", ["w4a8", "w8a8-static", "fp8", "mxfp4", "nvfp4", "w8a8-ort"])
def test_what_is_not_finite_is_an_error_that_names_the_tensor(name: str, value: float) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32))
    prepare(model, resolve(model, name))
    x = torch.randn(4, 64)
    calibrate(model, [x])
    broken = x.clone()
    broken[1, 5] = value
    with pytest.raises(ValueError, match=r"^0\.input: holds NaN or infinity, which has no code"):
        model(broken)
    with torch.no_grad():
        model[2].weight[3, 7] = value
    with pytest.raises(ValueError, match=r"^2\.weight: holds NaN or infinity, which has no code"):
        model(x)


def test_no_scale_is_the_nan_of_e8m0() -> None:
    scales = torch.tensor([[0.0, 1e-45, 2.0**-127, 1.0, 2.0**127, 3e38, torch.inf]])
    assert E8M0.encode(storable(scales, E8M0)).tolist() == [[0, 0, 0, 127, 254, 254, 254]]


# --- inputs -----------------------------------------------------------------------------------------------


@over("spec", SPECS)
def test_bfloat16_float16_and_float32_inputs_give_the_same_codes(spec: QuantSpec) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.cat([drawn(dtype, 8, 64), sample().clamp(-6e4, 6e4).to(dtype)])
        half, whole = qparams_of(x, spec), qparams_of(x.float(), spec)
        assert torch.equal(half.scale, whole.scale)
        assert torch.equal(half.scale, half.scale.float())
        assert torch.equal(quantize(x, half, spec), quantize(x.float(), whole, spec))


@over("spec", SPECS)
def test_blocks_a_million_and_a_billion_times_apart(spec: QuantSpec) -> None:
    x = torch.randn(24, 64)
    x[:, ::4] = 0.0
    x[8:16] /= 1e6
    x[16:] /= 1e9
    qparams = qparams_of(x, spec)
    y = fake_quantize(x, qparams, spec)
    assert (qparams.step != 0).all()
    assert y.isfinite().all()
    assert (y[:, ::4] == 0).all() or not spec.keeps_zero
    # The small ones never come out as something large, nor do they disturb the others.
    steps = qparams.step.abs().repeat_interleave(24 // len(qparams.step), 0).amax(1, keepdim=True)
    assert ((y - x).abs() <= x.abs().amax(1, keepdim=True) + steps).all()
    if spec.granularity.rows is not None and not spec.global_scale:
        alone = fake_quantize(x[:8], qparams_of(x[:8], spec), spec)
        np.testing.assert_array_equal(bits(y[:8]), bits(alone))


def test_a_block_that_outgrew_the_calibrated_global_scale_saturates() -> None:
    x = torch.randn(2, 32)
    whole = choose_global_scale(x.abs().amax(), NVFP4)
    x[0] *= 1e6
    qparams = qparams_of(x, NVFP4, whole)
    assert (qparams.scale[0] == 448).all()
    y = fake_quantize(x, qparams, NVFP4)
    assert y[0].abs().amax() == 6 * (448 * whole)
    assert (y[1] - x[1]).abs().amax() <= qparams.step[1].amax()
