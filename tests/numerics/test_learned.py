"""Learned scales and offsets as they are used: LSQ+, what is stored of them, and ParetoQ's formulas."""

import numpy as np
import pytest
import torch
from torch import Tensor

from recoup.numerics import (
    BFLOAT16,
    BINARY,
    E2M1,
    E4M3,
    E8M0,
    FLOAT16,
    FLOAT32,
    STRETCHED,
    TERNARY,
    FloatFormat,
    IntFormat,
    QParams,
    QuantSpec,
    fake_quantize,
    learned_qparams,
    per_channel,
    per_group,
    per_tensor,
    storable,
    storable_straight_through,
)

from .tables import over
from .test_gradients import case, gradscale, learned, spread

INT4, UINT4 = IntFormat(4), IntFormat(4, signed=False)
OFFSETS = (
    learned(INT4, per_group(8), "affine"),
    learned(IntFormat(8, signed=False), per_channel, "affine"),
    learned(UINT4, per_group(16), "affine", scale_format=FLOAT16),
    learned(INT4, per_group(16), "affine", scale_format=E4M3, global_scale=True),
    learned(UINT4, per_group(32), "min-max", scale_format=FLOAT16),
    learned(INT4, per_group(8), "min-max"),
    learned(UINT4, per_tensor, "min-max"),
    learned(E2M1, per_group(16), "min-max"),
    learned(UINT4, per_group(16), "affine", gradient="pass-through"),
)


def trained(spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """x, a scale and an offset that are near but not on what is stored, the global scale, and a gradient."""
    x, qparams, grad = case(spec)
    scale = qparams.scale * 1.003
    offset = qparams.offset if spec.has_offset else -qparams.zero_point * qparams.step
    return x + 0.3, scale, offset + 0.3 * qparams.step, qparams.global_scale, grad


@over("spec", OFFSETS)
def test_lsq_plus(spec: QuantSpec) -> None:
    """LSQ+ (Bhalgat et al. 2020, section 3.1), by its formulas, for what is stored."""
    x, scale, offset, whole, grad = trained(spec)
    leaves = [leaf.clone().requires_grad_() for leaf in (x, scale, offset)]
    qparams = learned_qparams(leaves[1], leaves[2], whole, spec)
    fake_quantize(leaves[0], qparams, spec).backward(grad)

    step = spread(qparams.step.detach(), x.shape).double()
    lo, hi = spec.format.lo, spec.format.hi
    if spec.has_offset:
        v = (x - spread(qparams.offset.detach(), x.shape)).double() / step
        q = spec.format.rint(v.float()).double()
        rounding = q - v
    else:
        zero = spread(qparams.zero_point.detach(), x.shape).double()
        assert torch.equal(zero, zero.round())
        v = x.double() / step + zero
        rounding = v.float().round() - v
    inside = (v.float() >= lo) & (v.float() <= hi)
    assert 0 < int((~inside).sum()) < x.numel() / 2
    n = x.numel() // scale.numel()
    factor = (n * hi) ** -0.5

    def of_blocks(terms: Tensor) -> Tensor:
        blocks = terms.reshape(scale.shape[0], -1, scale.shape[1], x.shape[1] // scale.shape[1])
        return blocks.sum(dim=(1, 3)) * factor

    slope = torch.where(inside, rounding, v.clamp(lo, hi))  # the bound alone: the offset moves the rest
    expected = of_blocks(grad.double() * slope) * (1 if whole is None else whole)
    reach = of_blocks(grad.double().abs() * (v.abs() + 2 * (hi - lo))) * (1 if whole is None else whole)
    assert ((leaves[1].grad - expected).abs() <= (n + 16) * 2.0**-23 * reach).all()
    expected = of_blocks(grad.double() * ~inside)
    assert ((leaves[2].grad - expected).abs() <= (n + 16) * 2.0**-23 * of_blocks(grad.double().abs())).all()
    assert leaves[2].grad.abs().max() > 0
    clipped = torch.where(inside, grad, 0.0) if spec.gradient == "clipped" else grad
    assert torch.equal(leaves[0].grad, clipped)


def test_lsq_plus_is_the_derivative_of_its_composition() -> None:
    """x^ = s round(clamp((x - b) / s)) + b under autograd, rounding passed straight through."""
    for granularity in (per_tensor, per_group(16)):
        spec = learned(UINT4, granularity, "min-max")
        x, scale, offset, _, grad = trained(spec)
        ours = [leaf.clone().requires_grad_() for leaf in (x, scale, offset)]
        fake_quantize(ours[0], learned_qparams(ours[1], ours[2], None, spec), spec).backward(grad)
        theirs = [leaf.clone().requires_grad_() for leaf in (x, scale, offset)]
        n = x.numel() // scale.numel()
        s, b = (spread(gradscale(leaf, (15 * n) ** -0.5), x.shape) for leaf in theirs[1:])
        v = torch.clamp((theirs[0] - b) / s, 0, 15)
        ((v + (v.round() - v).detach()) * s + b).backward(grad)
        for a, b, bound in zip(ours, theirs, (1.0, 30.0, 4.0), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=bound * (n + 16) * 2.0**-23 * n**0.5)


@over("spec", OFFSETS)
def test_finite_differences_of_the_surrogate_with_an_offset(spec: QuantSpec) -> None:
    """Frozen: the rounding of x, and the distance from each parameter to what is stored of it."""
    x, scale, offset, whole, grad = trained(spec)
    leaves = [leaf.clone().requires_grad_() for leaf in (scale, offset)]
    qparams = learned_qparams(*leaves, whole, spec)
    fake_quantize(x, qparams, spec).backward(grad)
    size = 1.0 if whole is None else whole.double()
    step = qparams.scale.detach().double()
    kept = qparams.offset if spec.has_offset else -qparams.zero_point * step * size
    kept = kept.detach().double()
    v = (x.double() - spread(kept, x.shape)) / spread(step * size, x.shape)
    inside = (v.float() >= spec.format.lo) & (v.float() <= spec.format.hi)
    error = spec.format.rint(v.float()).double() - v
    shape = (scale.shape[0], -1, scale.shape[1], x.shape[1] // scale.shape[1])
    n = x.numel() // scale.numel()
    factor = (n * spec.format.hi) ** -0.5

    def surrogate(by_scale: Tensor, by_offset: Tensor) -> Tensor:
        wide = spread((step + by_scale) * size, x.shape)
        moved = spread(kept + by_offset, x.shape)
        bound = v.clamp(spec.format.lo, spec.format.hi) * wide + moved
        return (torch.where(inside, x.double() + error * wide, bound) * grad.double()).reshape(shape)

    nothing, h, k = torch.zeros_like(step), step * 2.0**-10, step * size * 2.0**-10
    slopes = (
        ((surrogate(h, nothing) - surrogate(-h, nothing)) / (2 * h)[:, None, :, None], size),
        ((surrogate(nothing, k) - surrogate(nothing, -k)) / (2 * k)[:, None, :, None], 1.0),
    )
    reach = grad.abs().double() * (v.abs() + 2 * (spec.format.hi - spec.format.lo))
    for leaf, (slope, unit) in zip(leaves, slopes, strict=True):
        bound = (n + 16) * 2.0**-22 * (reach.reshape(shape).sum(dim=(1, 3)) * unit) * factor
        assert ((leaf.grad - slope.sum(dim=(1, 3)) * factor).abs() <= bound).all()


@over("spec", OFFSETS)
def test_a_learned_offset_starts_as_the_calibrated_one(spec: QuantSpec) -> None:
    _, qparams, _ = case(spec)
    start = qparams.offset if spec.has_offset else -qparams.zero_point * qparams.step
    found = learned_qparams(qparams.scale, start, qparams.global_scale, spec)
    assert torch.equal(found.scale, qparams.scale)
    if spec.has_offset:
        assert torch.equal(found.offset, qparams.offset)
    else:
        assert torch.equal(found.zero_point, qparams.zero_point.float())


def test_a_zero_point_past_its_range_still_has_a_gradient() -> None:
    spec = learned(UINT4, per_tensor, "affine")
    offset = torch.tensor([[40.0]], requires_grad=True)  # -40 is below 0, the least zero point
    qparams = learned_qparams(torch.ones(1, 1), offset, None, spec)
    assert qparams.zero_point.item() == 0
    fake_quantize(torch.tensor([[20.0, 5.0]]), qparams, spec).sum().backward()
    assert offset.grad.item() == np.float32(1 / 30**0.5)  # of 20, which is outside; N is 2 and Q_P is 15


@over("grid", (E8M0, FloatFormat(5, 0), E4M3, FLOAT16, BFLOAT16, FLOAT32))
def test_the_gradient_through_the_projection_of_a_scale(grid: object) -> None:
    scale = torch.cat([torch.rand(50) * 2.0 ** torch.randint(-6, 6, (50,)), torch.tensor([1.0, 1.5, 2.0])])[
        None
    ]
    leaf = scale.clone().requires_grad_()
    stored = storable_straight_through(leaf, grid)
    assert torch.equal(stored, storable(scale, grid))
    stored.sum().backward()
    if grid.mantissa_bits > 0:
        assert torch.equal(leaf.grad, torch.ones_like(scale))
        return
    # TQT: log2 of the stored scale is that of the scale, rounded straight through.
    exponent = scale.double().log2().requires_grad_()
    rounded = exponent + (stored.detach().double().log2() - exponent).detach()
    torch.exp2(rounded).sum().backward()
    of_scale = exponent.grad / (scale.double() * torch.tensor(2.0).double().log())
    torch.testing.assert_close(leaf.grad.double(), of_scale, rtol=2.0**-22, atol=0)
    assert (leaf.grad >= 2 / 3 - 1e-6).all()
    assert (leaf.grad <= 4 / 3 + 1e-6).all()


@pytest.mark.parametrize("value", [-1.0, 0.0, 2.0**-140, 3e38])
def test_a_scale_off_the_powers_of_two_finds_its_way_back(value: float) -> None:
    scale = torch.tensor([[value]], requires_grad=True)
    stored = storable_straight_through(scale, E8M0)
    stored.backward(torch.ones(1, 1))
    assert E8M0.lo <= stored.item() <= E8M0.hi
    assert scale.grad.item() == 1


PARETOQ = [(BINARY, 1.0, None, None), (TERNARY, 0.99, 1.5, 0.0), (STRETCHED, 0.99, 2.0, 0.5)]


@pytest.mark.parametrize(("grid", "clip", "n", "shift"), PARETOQ, ids=["1 bit", "1.58 bits", "2 bits"])
def test_paretoq(grid: object, clip: float, n: float | None, shift: float | None) -> None:
    """Its formulas (facebookresearch/ParetoQ, models/utils_quant.py), one scale for the whole tensor."""
    x, grad, f = torch.randn(8, 64), torch.randn(8, 64), np.float32
    x[0, :4] = torch.tensor([1e-9, -1e-9, 0.5, -0.5])
    alpha = torch.tensor([[1.3]])
    spec = learned(grid, per_tensor, "amax")
    leaves = x.clone().requires_grad_(), alpha.clone().requires_grad_()
    y = fake_quantize(leaves[0], QParams(scale=leaves[1]), spec)
    y.backward(grad)
    v = x.numpy() / f(1.3)
    if n is None:
        q = np.sign(x.numpy())
        slope = q
    else:
        q = (np.rint(np.clip(v, -f(clip), f(clip)) * f(n) - f(shift)) + f(shift)) / f(n)
        # Beyond the clip they take (n - shift) / n for the value. Of 2 bits it is, 3 / 4; of 1.58 bits they
        # take 1 where the value is 2 / 3. Ours is the value.
        assert (n - shift) / n == (0.75 if n == 2 else 1)
        slope = np.where(np.abs(v) <= f(clip), q - v, q)
    np.testing.assert_array_equal(y.detach().numpy(), q * f(1.3))
    np.testing.assert_array_equal(leaves[0].grad.numpy(), np.where(np.abs(v) <= f(clip), grad.numpy(), 0))
    expected = (grad.double().numpy() * slope).sum() / x.numel() ** 0.5
    assert abs(leaves[1].grad.item() - expected) <= 1e-5


def test_one_bit_of_zero_is_one() -> None:
    # Theirs is 0, which one bit cannot say.
    assert BINARY.rint(torch.tensor([0.0, -0.0])).tolist() == [1.0, 1.0]
