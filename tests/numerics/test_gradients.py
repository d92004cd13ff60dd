"""The gradients of fake quantization against their definitions, written here a second time."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from recoup.numerics import (
    BINARY,
    E2M1,
    E4M3,
    E8M0,
    FLOAT16,
    MXINT8,
    NF4,
    STRETCHED,
    TERNARY,
    FloatFormat,
    Granularity,
    IntFormat,
    QParams,
    QuantSpec,
    drawn,
    fake_quantize,
    per_block,
    per_channel,
    per_group,
    per_tensor,
    qparams_of,
)

from .tables import over

INT2, INT4, UINT4 = IntFormat(2), IntFormat(4), IntFormat(4, signed=False)
INT2_NARROW = IntFormat(2, narrow=True)


def learned(grid: object, granularity: Granularity, rule: str = "narrow", **fields: object) -> QuantSpec:
    return QuantSpec(format=grid, granularity=granularity, scale_rule=rule, ranges="learned", **fields)


LEARNED = (
    learned(INT4, per_tensor),
    learned(INT4, per_channel, "half-range"),
    learned(INT4, per_group(8), "signed-max"),
    learned(IntFormat(8), per_channel),
    learned(IntFormat(3, narrow=True), per_block(2, 8)),
    learned(INT2, per_group(16)),
    learned(INT4, per_group(8), "affine"),
    learned(IntFormat(8, signed=False), per_channel, "affine"),
    learned(E2M1, per_group(16)),
    learned(E4M3, per_tensor),
    learned(E2M1, per_group(16), scale_format=E4M3, global_scale=True),
    learned(INT4, per_group(16), scale_format=E4M3, global_scale=True),
    learned(E2M1, per_group(32), "even", scale_format=E8M0),
    learned(MXINT8, per_group(32), "rceil", scale_format=E8M0),
    learned(NF4, per_group(32), "amax"),
    learned(BINARY, per_group(16), "amax"),
    learned(TERNARY, per_channel, "amax"),
    learned(STRETCHED, per_channel, "amax"),
    learned(STRETCHED, per_group(16), "amax", scale_format=FLOAT16),
    learned(INT4, per_group(16), "signed-max", scale_format=FLOAT16),
    learned(INT2_NARROW, per_group(32), scale_format=FLOAT16),
    learned(E2M1, per_group(16), "narrow", scale_format=E4M3, gradient="pass-through"),
    learned(FloatFormat(3, 2), per_group(8)),
)


def positive_levels(grid: object) -> float:
    """Q_P by hand: the largest integer or float; ParetoQ's 2^(bits - 1) - 1, at least 1."""
    if grid in (NF4, BINARY, TERNARY, STRETCHED):
        return 1.0
    return 127.0 if grid == MXINT8 else grid.hi


def spread(scale: Tensor, shape: torch.Size) -> Tensor:
    return scale.repeat_interleave(shape[0] // scale.shape[0], 0).repeat_interleave(
        shape[1] // scale.shape[1], 1
    )


def case(spec: QuantSpec) -> tuple[Tensor, QParams, Tensor]:
    """Inputs of which a fair part lies outside, because the scales are those of the inputs divided by 1.7."""
    x = torch.randn(8, 64)
    qparams = qparams_of(x / 1.7, spec)
    return x, qparams, torch.randn(8, 64)


def with_scale(qparams: QParams, scale: Tensor) -> QParams:
    return QParams(scale=scale, zero_point=qparams.zero_point, global_scale=qparams.global_scale)


def lsq(x: Tensor, scale: Tensor, qparams: QParams, spec: QuantSpec, codes: Tensor | None = None) -> Tensor:
    """LSQ (Esser et al. 2020), its appendix's pseudo code, as a composition that autograd differentiates.

    Rounded are the values inside, to the nearest or to `codes`, which are those of all values.
    """
    elements = x.numel() // scale.numel()
    factor = 1 / (elements * positive_levels(spec.format)) ** 0.5
    s = gradscale(scale, factor)
    s = spread(s if qparams.global_scale is None else s * qparams.global_scale, x.shape)
    zero = 0 if qparams.zero_point is None else spread(qparams.zero_point, x.shape)
    clip = 0.99 if spec.format in (TERNARY, STRETCHED) else None
    v = torch.clamp(x / s + zero, -clip if clip else spec.format.lo, clip or spec.format.hi) - zero
    rounded = spec.format.rint(v).detach()  # rounding an integer zero point changes nothing
    rounded = rounded if codes is None else codes
    if spec.format is BINARY:  # its scale multiplies the sign, whatever x is
        through = torch.clamp(x / s.detach(), -1, 1) * s.detach()
        return rounded * s + through - through.detach()
    return (v + (rounded - v).detach()) * s  # roundpass


def gradscale(x: Tensor, factor: float) -> Tensor:
    return x * factor + (x - x * factor).detach()


@pytest.mark.parametrize("seed", [None, 3], ids=["nearest", "drawn"])
@over("spec", LEARNED)
def test_lsq(spec: QuantSpec, seed: int | None) -> None:
    x, qparams, grad = case(spec)
    moved = codes = None
    if seed is not None:
        moved = drawn(x, qparams, spec, seed)
        codes = fake_quantize(moved, qparams, spec) / spread(qparams.step, x.shape)
        assert not torch.equal(fake_quantize(moved, qparams, spec), fake_quantize(x, qparams, spec))
    ours = (x.clone().requires_grad_(), qparams.scale.clone().requires_grad_())
    fake_quantize(ours[0], with_scale(qparams, ours[1]), spec, moved).backward(grad)
    theirs = (x.clone().requires_grad_(), qparams.scale.clone().requires_grad_())
    lsq(theirs[0], theirs[1], qparams, spec, codes).backward(grad)

    clipped = theirs[0].grad == 0
    assert 0 < int(clipped.sum()) < x.numel() / 2
    if spec.gradient == "clipped":
        assert torch.equal(ours[0].grad == 0, clipped)
        assert torch.equal(ours[0].grad[~clipped], grad[~clipped])  # theirs has x / s * s in it, which rounds
    else:
        assert torch.equal(ours[0].grad, grad)

    # A sum of n float32 terms errs by at most n roundings of the sum of their magnitudes; a term is at most
    # the position (|x / step| or the bound, with the zero point), and each side rounds it a few times.
    n = x.numel() // qparams.scale.numel()
    terms = grad.abs() * (x / spread(qparams.step, x.shape)).abs().clamp(min=spec.format.hi - spec.format.lo)
    largest = terms.reshape(
        qparams.scale.shape[0], -1, qparams.scale.shape[1], x.shape[1] // qparams.scale.shape[1]
    )
    bound = (n + 8) * 2.0**-23 * largest.sum(dim=(1, 3)) / (n * positive_levels(spec.format)) ** 0.5
    bound = bound if qparams.global_scale is None else bound * qparams.global_scale
    assert ours[1].grad.abs().min() > 0
    assert ((ours[1].grad - theirs[1].grad).abs() <= bound).all()


def test_lsq_by_hand() -> None:
    # N = 4, hi = 1: the factor is 1 / 2. x / s = 0.25, 0.75, -0.75, 5: slopes -0.25, 0.25, -0.25, 1.
    spec = learned(INT2, per_tensor)
    x = torch.tensor([[0.125, 0.375, -0.375, 2.5]], requires_grad=True)
    scale = torch.tensor([[0.5]], requires_grad=True)
    y = fake_quantize(x, QParams(scale=scale), spec)
    assert y.tolist() == [[0.0, 0.5, -0.5, 0.5]]
    y.backward(torch.tensor([[1.0, 2.0, 4.0, 8.0]]))
    assert x.grad.tolist() == [[1.0, 2.0, 4.0, 0.0]]
    assert scale.grad.tolist() == [[(-0.25 + 0.5 - 1.0 + 8.0) / 2]]


def test_lsq_with_a_zero_point_by_hand() -> None:
    # N = 4, hi = 7 and lo = -8, zero point 3: the position 5 + 3 is past 7, -12 + 3 is past -8.
    spec = learned(INT4, per_tensor, "affine")
    x = torch.tensor([[5.0, -12.0, 1.25, 4.0]], requires_grad=True)
    scale = torch.ones(1, 1, requires_grad=True)
    qparams = QParams(scale=scale, zero_point=torch.tensor([[3]], dtype=torch.int32))
    y = fake_quantize(x, qparams, spec)
    assert y.tolist() == [[4.0, -11.0, 1.0, 4.0]]
    y.backward(torch.ones(1, 4))
    assert x.grad.tolist() == [[0.0, 0.0, 1.0, 1.0]]
    expected = torch.tensor([[4.0 - 11.0 - 0.25 + 0.0]]) / 28**0.5
    assert torch.equal(scale.grad, expected)


@over("spec", LEARNED)
def test_finite_differences_of_the_smooth_surrogate(spec: QuantSpec) -> None:
    """With the rounding error frozen, x^ is piecewise linear in the scale: differences are exact."""
    x, qparams, grad = case(spec)
    scale = qparams.scale.clone().requires_grad_()
    fake_quantize(x, with_scale(qparams, scale), spec).backward(grad)

    whole = 1.0 if qparams.global_scale is None else qparams.global_scale.double()
    zero = 0.0 if qparams.zero_point is None else spread(qparams.zero_point, x.shape).double()
    lo, hi = spec.format.lo - zero, spec.format.hi - zero
    position = x.double() / spread(qparams.scale.double() * whole, x.shape)
    kept = (position >= lo) & (position <= hi)
    if spec.format in (TERNARY, STRETCHED):
        kept = position.float().abs() <= 0.99
    if spec.format is BINARY:
        kept &= False  # its value is a sign, inside too
        lo = hi = torch.where(position < 0, -1.0, 1.0).double()
    error = spec.format.rint(position.float()).double() - position

    def surrogate(step: Tensor) -> Tensor:
        wide = spread(step * whole, x.shape)
        outside = torch.where(position < lo, lo, hi) * wide
        return (torch.where(kept, x.double() + error * wide, outside) * grad.double()).reshape(
            scale.shape[0], -1, scale.shape[1], x.shape[1] // scale.shape[1]
        )

    h = qparams.scale.double() * 2.0**-10
    terms = surrogate(qparams.scale.double() + h) - surrogate(qparams.scale.double() - h)
    n = x.numel() // scale.numel()
    factor = (n * positive_levels(spec.format)) ** -0.5
    difference = (terms / (2 * h)[:, None, :, None]).sum(dim=(1, 3)) * factor
    reach = (grad.abs() * position.abs().clamp(min=spec.format.hi - spec.format.lo)).double() * whole
    bound = (n + 8) * 2.0**-23 * reach.reshape(terms.shape).sum(dim=(1, 3)) * factor
    assert ((scale.grad.double() - difference).abs() <= bound).all()


@pytest.mark.parametrize("ranges", ["dynamic", "static"])
@pytest.mark.parametrize("grid", [INT4, IntFormat(8), E2M1, E4M3], ids=lambda grid: grid.name)
def test_straight_through(grid: object, ranges: str) -> None:
    x, grad = torch.randn(8, 64), torch.randn(8, 64)
    for gradient in ("clipped", "pass-through"):
        spec = QuantSpec(
            format=grid, granularity=per_channel, scale_rule="narrow", ranges=ranges, gradient=gradient
        )
        qparams = qparams_of(x / 1.7, spec)
        leaf = x.clone().requires_grad_()
        fake_quantize(leaf, qparams, spec).backward(grad)
        # "1[lo <= rint(x / s) <= hi]": saturated means that rounding alone leads past the range
        rounded = spec.format.rint(x / qparams.scale)
        inside = (rounded >= spec.format.lo) & (rounded <= spec.format.hi)
        assert 0 < int((~inside).sum()) < x.numel() / 2
        expected = torch.where(inside, grad, 0.0) if gradient == "clipped" else grad
        assert torch.equal(leaf.grad, expected)


def test_rounding_decides_what_is_clipped_unless_the_scale_is_learned() -> None:
    # 7.4 rounds to 7, which is inside; LSQ asks 7.4 itself.
    for ranges, expected in (("static", [1.0, 0.0, 1.0, 0.0]), ("learned", [0.0, 0.0, 0.0, 0.0])):
        spec = QuantSpec(format=INT4, granularity=per_tensor, scale_rule="narrow", ranges=ranges)
        x = torch.tensor([[7.4, 7.6, -8.4, -8.6]], requires_grad=True)
        fake_quantize(x, QParams(scale=torch.ones(1, 1)), spec).sum().backward()
        assert x.grad.tolist() == [expected]


def test_pass_through_with_a_learned_scale_keeps_the_scales_gradient() -> None:
    grads = []
    for gradient in ("clipped", "pass-through"):
        spec = learned(INT4, per_channel, gradient=gradient)
        torch.manual_seed(1)
        x, qparams, grad = case(spec)
        x.requires_grad_()
        scale = qparams.scale.clone().requires_grad_()
        fake_quantize(x, QParams(scale=scale), spec).backward(grad)
        grads.append(scale.grad)
        assert torch.equal(x.grad, grad) == (gradient == "pass-through")
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_inputs_get_half_gradients_and_float32_scale_gradients(dtype: torch.dtype) -> None:
    spec = learned(INT4, per_group(16))
    x = torch.randn(8, 64).to(dtype)
    qparams = qparams_of(x / 2, spec)
    grad = torch.randn(8, 64).to(dtype)
    results = []
    for leaf in (x.clone().requires_grad_(), x.float().requires_grad_()):
        scale = qparams.scale.clone().requires_grad_()
        fake_quantize(leaf, QParams(scale=scale), spec).backward(grad.to(leaf.dtype))
        assert leaf.grad.dtype == leaf.dtype
        assert scale.grad.dtype == torch.float32
        results.append((leaf.grad.float(), scale.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_no_gradient_for_a_scale_that_is_not_learned() -> None:
    spec = QuantSpec(format=INT4, granularity=per_tensor, scale_rule="narrow", ranges="static")
    x = torch.randn(2, 4, requires_grad=True)
    scale = torch.ones(1, 1, requires_grad=True)
    fake_quantize(x, QParams(scale=scale), spec).sum().backward()
    assert scale.grad is None


COMPILED = """
import torch
from recoup.numerics import *

torch.manual_seed(0)
stored = dict(scale_format=E4M3, global_scale=True)
nvfp4 = dict(format=E2M1, granularity=per_group(16), scale_rule="narrow", **stored)
affine = dict(format=IntFormat(8, signed=False), granularity=per_token, scale_rule="affine")
uint4 = IntFormat(4, signed=False)
min_max = dict(format=uint4, granularity=per_group(32), scale_rule="min-max", scale_format=FLOAT16)
nf4 = dict(format=NF4, granularity=per_group(64), scale_rule="amax")
ternary = dict(format=TERNARY, granularity=per_channel, scale_rule="amax")
mxint8 = dict(format=MXINT8, granularity=per_group(32), scale_rule="rceil", scale_format=E8M0)
four_over_six = {**nvfp4, "scale_rule": "four-over-six"}
dynamic = [(fields, "dynamic") for fields in (nvfp4, four_over_six, min_max, nf4)]
learned = [(fields, "learned") for fields in (affine, min_max, nf4, ternary, mxint8)]
for fields, ranges in dynamic + learned:
    spec = QuantSpec(**fields, ranges=ranges)
    x, grad = torch.randn(4, 64), torch.randn(4, 64)
    start = qparams_of(x / 1.7, spec)
    offset = start.offset
    if start.zero_point is not None:
        offset = -start.zero_point * start.scale

    def run(x, scale, offset):
        if ranges == "dynamic":
            return fake_quantize(x, qparams_of(x, spec), spec)
        return fake_quantize(x, learned_qparams(scale, offset, None, spec), spec)

    results = []
    for backend in ("aot_eager", None):
        torch.compiler.reset()
        call = torch.compile(run, fullgraph=True, backend=backend) if backend else run
        shifted = None if offset is None else offset.clone().requires_grad_()
        leaves = x.clone().requires_grad_(), start.scale.clone().requires_grad_(), shifted
        y = call(*leaves)
        y.backward(grad)
        results.append([y, *(leaf.grad for leaf in leaves if leaf is not None and leaf.grad is not None)])
    assert len(results[0]) == (2 if ranges == "dynamic" else 3 if spec.symmetric else 4)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True)), (fields, ranges)
print("identical")
"""


def test_compiles_into_one_graph_with_the_same_output_and_gradient() -> None:
    # Without this process's type checks, which Dynamo cannot trace.
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "identical", done.stderr[-3000:]
