"""The kernels against the reference: the same values, the same gradients, one byte a value."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

from recoup.numerics import (
    LevelFormat,
    QParams,
    QuantSpec,
    drawn,
    fake_quantize,
    kernels,
    per_channel,
    qparams_of,
)
from recoup.numerics.kernels import KERNELS, compiled, kept
from recoup.numerics.kernels.carrier import carrier_of
from recoup.numerics.kernels.choose import WORTH_COMPILING
from recoup.numerics.kernels.kept import may_saturate, pack_bits, unpack_bits, with_nan
from recoup.numerics.kernels.place import place

from .tables import SPECS, numbers_of, over, sample
from .test_gradients import LEARNED

CPU = torch.device("cpu")
FUSED = KERNELS["fused"]
FORMATS = list({spec.format: spec for spec in SPECS}.values())


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    """No type checks of numerics over the whole table: they cost ten times what they check."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(params=["whole", "pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of a test are smaller than a piece; half of the tests run on smaller pieces."""
    if request.param == "pieces":
        monkeypatch.setattr(kept, "PIECE", 100)


def reference(x: Tensor, qparams: QParams, spec: QuantSpec, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    y = fake_quantize(leaf, qparams, spec)
    y.backward(grad)
    return y.detach(), leaf.grad


def narrowed(spec: QuantSpec, **fields: Any) -> QuantSpec:
    given = {name: getattr(spec, name) for name in spec.__dataclass_fields__}
    return QuantSpec(**{**given, **fields})


@over("spec", SPECS)
def test_kept_bytes_come_back_as_the_reference_has_them(spec: QuantSpec, pieces: None) -> None:
    for ranges, shrink in (("dynamic", 1.0), ("static", 1.7)):
        some = narrowed(spec, ranges=ranges)
        x = sample()
        qparams = qparams_of(x / shrink, some)
        grad = torch.randn(x.shape)
        y, grad_x = reference(x, qparams, some, grad)
        codes = FUSED.keep(x, qparams, some, None)
        assert codes.values.shape == x.shape
        assert codes.values.element_size() == 1
        assert codes.nbytes <= x.numel() * 9 / 8 + 1
        assert torch.equal(FUSED.restore(codes, torch.empty(x.shape)), y)
        assert torch.equal(FUSED.clip_(grad.clone(), codes), grad_x)


@over("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_values_are_rounded_once(spec: QuantSpec, dtype: torch.dtype) -> None:
    x = sample().clamp(-1000, 1000).to(dtype)
    qparams = qparams_of(x, spec)
    restored = FUSED.restore(FUSED.keep(x, qparams, spec, None), torch.empty(x.shape, dtype=dtype))
    assert torch.equal(restored, fake_quantize(x, qparams, spec))


def test_pass_through_clips_nothing() -> None:
    spec = narrowed(FORMATS[0], gradient="pass-through", ranges="static")
    x = sample()
    codes = FUSED.keep(x, qparams_of(x / 2, spec), spec, None)
    assert torch.equal(FUSED.clip_(x.clone(), codes), x)


@over("spec", FORMATS)
def test_every_number_has_a_byte_and_what_lies_beyond_is_marked(spec: QuantSpec) -> None:
    grid, carrier = spec.format, carrier_of(spec.format)
    numbers = numbers_of(grid)

    def packed(values: Tensor) -> Tensor:
        return carrier.pack(values.clone(), torch.empty(values.shape, dtype=carrier.dtype))

    assert torch.equal(carrier.unpack(packed(numbers), torch.empty(numbers.shape)), numbers)
    if carrier.marks:
        beyond = torch.tensor([2 * grid.hi, grid.lo - grid.hi, 50 * grid.hi])
        kept_beyond = packed(beyond)
        for values, passes in ((packed(numbers), 1.0), (kept_beyond, 0.0)):
            grad, work = torch.ones(values.shape), torch.empty(values.shape)
            assert torch.equal(carrier.clip_(grad, values, work), torch.full(values.shape, passes))
        ends = torch.tensor([grid.hi, grid.lo, grid.hi])
        assert torch.equal(carrier.unpack(kept_beyond, torch.empty(3)), ends)


def test_integers_and_fp4_are_marked_in_the_byte_and_bytes_that_are_full_are_not() -> None:
    marked = {spec.format.name for spec in FORMATS if carrier_of(spec.format).marks}
    assert {"int2", "int4", "int7", "e2m1", "e2m3"} <= marked
    assert not {"int8", "uint8", "e4m3"} & marked


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000])
def test_bits_come_back(count: int) -> None:
    bits = torch.randint(0, 2, (count,), dtype=torch.uint8)
    packed = pack_bits(bits)
    assert packed.numel() == -(-count // 8)
    assert torch.equal(unpack_bits(packed, count), bits)


@over(
    "spec",
    [spec for spec in SPECS if not may_saturate(narrowed(spec, ranges="dynamic"), carrier_of(spec.format))],
)
def test_where_no_mask_is_kept_nothing_saturates(spec: QuantSpec) -> None:
    x = sample()
    _, grad_x = reference(x, qparams_of(x, spec), narrowed(spec, ranges="dynamic"), torch.ones(x.shape))
    assert grad_x.all()


@pytest.mark.parametrize("seed", [None, 3], ids=["nearest", "drawn"])
@over("spec", [*FORMATS, *LEARNED])
def test_the_function_has_the_references_value_and_gradients(spec: QuantSpec, seed: int | None) -> None:
    x, found = sample(), []
    spec = narrowed(spec, ranges="learned" if spec.ranges == "learned" else "static")
    start, grad = qparams_of(x / 1.7, spec), torch.randn(x.shape)
    moved = None if seed is None else drawn(x, start, spec, seed)
    for function in (fake_quantize, lambda *given: kernels.fake_quantize(*given[:3], FUSED, given[3])):
        leaf, qparams, leaves = x.clone().requires_grad_(), start, []
        if spec.ranges == "learned":
            fields = ("scale", "zero_point", "offset")
            tensors = {name: getattr(start, name) for name in fields if getattr(start, name) is not None}
            trained = {name: tensor.float().clone().requires_grad_() for name, tensor in tensors.items()}
            leaves = list(trained.values())
            qparams = QParams(**trained, global_scale=start.global_scale)
        given = grad.clone()
        y = function(leaf, qparams, spec, moved)
        y.backward(given)
        assert torch.equal(given, grad), "a gradient that is not ours was written over"
        found.append([y.detach(), *(tensor.grad for tensor in (leaf, *leaves))])
    for theirs, ours in zip(*found, strict=True):
        assert torch.equal(theirs, ours)


PAIRS = [
    (None, 0),
    *((inputs, weights) for inputs in (0, 1, 2, 3) for weights in (0, 2)),
    *((inputs, 0) for inputs in (-1, -4)),
    *((None, weights) for weights in (-1, -4, -7)),
]


@pytest.mark.parametrize("seed", [None, 3], ids=["nearest", "drawn"])
@pytest.mark.parametrize(("of_input", "of_weight"), PAIRS)
def test_linear_is_the_composition(of_input: int | None, of_weight: int, seed: int | None) -> None:
    rows = [*_ROWS, *LEARNED]
    w_spec, x_spec = rows[of_weight], None if of_input is None else rows[of_input]
    x, weight, bias, grad = torch.randn(24, 64), torch.randn(8, 64), torch.randn(8), torch.randn(24, 8)
    of_w = qparams_of(weight / 1.7, w_spec)
    of_x = None if x_spec is None else qparams_of(x / 1.7, x_spec)
    moved = weight if seed is None else drawn(weight, of_w, w_spec, seed)
    found = []
    for fused in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        scales = [None if q is None else q.scale.clone().requires_grad_() for q in (of_x, of_w)]
        made = [q and QParams(**{**vars(q), "scale": s}) for q, s in zip((of_x, of_w), scales, strict=True)]
        if fused:
            with torch.no_grad():
                of_weight = made[1], FUSED.keep(moved, made[1], w_spec, None)
                of_input = made[0] and (made[0], FUSED.keep(leaves[0], made[0], x_spec, None))
            y = kernels.linear(leaves[0], of_input, leaves[1], of_weight, leaves[2], FUSED)
        else:
            q = leaves[0] if made[0] is None else fake_quantize(leaves[0], made[0], x_spec)
            y = torch.nn.functional.linear(q, fake_quantize(leaves[1], made[1], w_spec, moved), leaves[2])
        y.backward(grad)
        found.append(
            [y.detach(), *(leaf.grad for leaf in leaves), *(s.grad for s in scales if s is not None)]
        )
    for theirs, ours in zip(*found, strict=True):
        assert (theirs is None and ours is None) or torch.equal(theirs, ours)


_ROWS = [
    narrowed(
        next(spec for spec in SPECS if (spec.format.name, spec.scale_rule) == (name, rule)), ranges="static"
    )
    for name, rule in (("int4", "half-range"), ("int8", "narrow"), ("e2m1", "narrow"), ("uint8", "affine"))
]


def test_grids_that_do_not_round_past_their_ends_keep_a_mask() -> None:
    for levels in ((-1.0, 0.0, 2.0), (-0.05, 0.0, 0.05)):
        spec = QuantSpec(
            format=LevelFormat("own", levels), granularity=per_channel, scale_rule="narrow", ranges="dynamic"
        )
        assert may_saturate(spec, carrier_of(spec.format))


def test_nan_that_no_byte_can_say_is_in_the_scale() -> None:
    spec = narrowed(next(spec for spec in SPECS if str(spec.granularity) == "g4"), ranges="static")
    x = torch.randn(2, 8)
    qparams = qparams_of(x, spec)
    x[1, 2] = torch.nan
    found = with_nan(x, qparams, spec).scale
    assert found.isnan().tolist() == [[False, False], [True, False]]
    assert torch.equal(found.nan_to_num(), torch.where(found.isnan(), 0.0, qparams.scale))


# --- compiled --------------------------------------------------------------------------------------------

COMPILED = """
import sys, torch
from recoup.numerics import *
from recoup.numerics import kernels
from recoup.numerics.kernels import KERNELS
from recoup.schemes import PRESETS
from dataclasses import replace

torch.manual_seed(0)
eager, made = KERNELS["fused"], KERNELS["compiled"]
for name in sys.argv[1:]:
    scheme = PRESETS[name.rstrip("!")]
    spec = scheme.inputs if name.endswith("!") else scheme.weights
    with torch.inference_mode():  # an evaluation may come first
        x = torch.randn(8, 512)
        kept = made.keep(x, qparams_of(x, spec), spec, None)
        assert torch.equal(made.restore(kept, torch.empty(x.shape)), fake_quantize(x, kept.qparams, spec))
    for rows, columns in ((8, 512), (24, 512)):
        x = torch.randn(rows, columns)
        x[1] = torch.randint(-16, 17, (columns,)) / 4
        x[2, 3], x[3], x[5] = 300.0, x[3].abs(), 0.0
        for shrink in (1.0, 1.7):
            qparams = qparams_of(x / shrink, spec)
            ours, theirs = made.keep(x, qparams, spec, None), eager.keep(x, qparams, spec, None)
            if shrink == 1.0 and spec.ranges == "dynamic" and not spec.global_scale:
                ours = made.keep(x, None, spec, None)
                assert torch.equal(ours.qparams.scale, qparams.scale), (name, rows, columns)
            assert torch.equal(ours.values, theirs.values), (name, rows, columns)
            moved = drawn(x, qparams, spec, 3)
            found = [each.keep(moved, qparams, spec, None).values for each in (made, eager)]
            assert torch.equal(*found), (name, rows, columns)
            assert (ours.saturated is None) == (theirs.saturated is None)
            assert ours.saturated is None or torch.equal(ours.saturated, theirs.saturated)
            y = made.restore(ours, torch.empty(x.shape))
            assert torch.equal(y, fake_quantize(x, qparams, spec)), (name, rows, columns)
            grad = torch.randn(x.shape)
            assert torch.equal(made.clip_(grad.clone(), ours), eager.clip_(grad.clone(), ours))
            try:
                made.keep(x.index_fill(0, torch.tensor(4), torch.inf), qparams, spec, None)
            except kernels.NotFiniteError:
                pass
            else:
                raise AssertionError(name)
"""

TILES = """
spec = PRESETS["fp8-block"].weights  # one row of tiles, and several
for rows in (128, 256, 384, 128):
    x = torch.randn(rows, 256)
    qparams = qparams_of(x, spec)
    y = made.restore(made.keep(x, qparams, spec, None), torch.empty(x.shape))
    assert torch.equal(y, fake_quantize(x, qparams, spec)), rows
"""


@pytest.mark.parametrize(
    ("names", "more"),
    [("w4a8 w4a8! q4_1 nf4", ""), ("nvfp4 mxfp4 w8a8-ort-static! fp8-static", TILES)],
    ids=["integers and levels", "floats"],
)
def test_compiled_kernels_give_the_same_bytes(names: str, more: str) -> None:
    """In a process without this one's type checks, which Dynamo cannot trace; a process begins slowly."""
    code = f'{COMPILED}{more}\nprint("identical")'
    command = [sys.executable, "-c", code, *names.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "identical", done.stderr[-3000:]


MANY_WIDTHS = """
import torch
from torch._inductor import compile_fx as inductor

# What was traced, in eager torch.
inductor.compile_fx = lambda graph, examples, *, inner_compile, **_: inner_compile(graph)
inductor.compile_fx_inner = lambda graph: lambda given: graph(*given[len([*graph.buffers()]):])
from recoup.numerics import *
from recoup.numerics.kernels import KERNELS, compiled
from recoup.schemes import PRESETS

made = KERNELS["compiled"]
compiled._reads_bytes = lambda device: True
for name in ("w8a8", "w4a16", "w8a8-static!", "w8a8!", "nvfp4!", "fp8-block"):
    scheme = PRESETS[name.rstrip("!")]
    spec = scheme.inputs if name.endswith("!") else scheme.weights
    for width in range(128, 128 * 5, 128):
        for rows in (128, 256, 384) if name == "fp8-block" else (1, 2, 5, 32, 0):
            x = torch.randn(rows, width)
            own = rows > 0 and spec.ranges == "dynamic" and not spec.global_scale
            qparams = qparams_of(x if rows else torch.randn(1, width), spec)
            codes = made.keep(x, None if own else qparams, spec, None)
            assert not own or torch.equal(codes.qparams.scale, qparams.scale)
            y = made.restore(codes, torch.empty(x.shape))
            assert rows == 0 or torch.equal(y, fake_quantize(x, qparams, spec)), (name, rows, width)
            wide, tall = torch.cat([x, x], dim=1)[:, :width], x.T.contiguous().T  # views with other strides
            for view in (wide, tall) if rows else ():
                assert torch.equal(made.keep(view, qparams, spec, None).values, codes.values)
            again = made.keep(x * 0.5, qparams, spec, codes)
            assert again.values is codes.values
            assert torch.equal(made.restore(again, y), fake_quantize(x * 0.5, qparams, spec))
            if rows and spec.ranges == "static":
                qparams.scale.mul_(0.5)  # in place, and then other ones
                for scales in (qparams, qparams_of(3 * x, spec)):
                    again = made.keep(x, scales, spec, again)
                    assert torch.equal(made.restore(again, y), fake_quantize(x, scales, spec))
print("all of them", len(compiled._kernels))
"""


def test_compiled_kernels_serve_many_widths_and_no_rows_at_all() -> None:
    done = subprocess.run([sys.executable, "-c", MANY_WIDTHS], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("all of them"), done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) < 80, "a kernel for every number of rows"


def test_without_a_compiler_compiled_is_refused_and_auto_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    many = WORTH_COMPILING
    monkeypatch.setattr(
        compiled.shutil, "which", lambda name: f"/usr/bin/{name}" if "no-such" not in name else None
    )
    monkeypatch.setattr(compiled.Path, "exists", lambda path: "nowhere" not in str(path))
    assert kernels.choose("auto", CPU, many)[0] == "compiled"
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r'impl "compiled" asked, but no C\+\+ compiler .no-such-compiler.'):
        kernels.choose("compiled", CPU, 1)
    assert kernels.choose("auto", CPU, many) == ("fused", compiled.missing(CPU))
    assert kernels.choose("reference", CPU, many) == ("reference", "asked for")
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(compiled.sysconfig, "get_path", lambda name: "/nowhere")
    assert "Python.h" in str(compiled.missing(CPU))


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(ValueError, match="impl 'fast' asked; there are auto, reference, fused, compiled"):
        kernels.choose("fast", CPU, 1)


def test_a_place_is_the_same_memory_until_it_has_to_grow() -> None:
    cpu = torch.device("cpu")
    small, flat = (place("test", torch.Size(shape), torch.float32, cpu) for shape in ((2, 8), (16,)))
    assert small.data_ptr() == flat.data_ptr()
    large = place("test", torch.Size((4, 8)), torch.float32, cpu)
    assert place("test", torch.Size((2, 8)), torch.float32, cpu).data_ptr() == large.data_ptr()
    assert place("other", torch.Size((4, 8)), torch.float32, cpu).data_ptr() != large.data_ptr()
