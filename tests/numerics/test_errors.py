"""Every mistake a user can make here, and the message that says what to do instead."""

from collections.abc import Callable

import pytest
import torch

from recoup.numerics import (
    E2M1,
    E8M0,
    FLOAT16,
    FixedFormat,
    FloatFormat,
    Granularity,
    IntFormat,
    LevelFormat,
    QuantSpec,
    StretchedFormat,
    choose_qparams,
    extrema,
    fake_quantize,
    per_block,
    per_group,
    per_tensor,
    qparams_of,
    quantize,
)


def spec(**fields: object) -> QuantSpec:
    given = {"format": IntFormat(4), "granularity": per_tensor, "scale_rule": "narrow", "ranges": "dynamic"}
    return QuantSpec(**{**given, **fields})


X = torch.ones(6, 12)

MISTAKES: list[tuple[str, Callable[[], object]]] = [
    ("IntFormat: 1 bits asked; 2 to 8 are possible", lambda: IntFormat(1)),
    ("IntFormat: 9 bits asked; 2 to 8 are possible", lambda: IntFormat(9)),
    ("unsigned grid has no most negative value", lambda: IntFormat(4, signed=False, narrow=True)),
    ("FloatFormat: 0 exponent and 3 mantissa bits asked", lambda: FloatFormat(0, 3)),
    ("FloatFormat: 9 exponent and 2 mantissa bits asked", lambda: FloatFormat(9, 2, specials="ieee")),
    ("FloatFormat: 4 exponent and -1 mantissa bits asked", lambda: FloatFormat(4, -1)),
    ("FloatFormat: 4 exponent and 24 mantissa bits asked", lambda: FloatFormat(4, 24)),
    ('8 exponent bits reach past float32 unless specials="ieee"', lambda: FloatFormat(8, 3)),
    ('8 exponent bits reach past float32 unless specials="ieee"', lambda: FloatFormat(8, 3, specials="nan")),
    ("granularity: 0 rows asked; a block has at least one", lambda: Granularity(rows=0, columns=None)),
    ("granularity: -3 columns asked; a block has at least one", lambda: per_group(-3)),
    (
        r"12 columns cannot be cut into groups of 5; use per_channel, or .* among \[2, 3, 4, 6, 12\]",
        lambda: per_group(5).scale_shape(6, 12),
    ),
    (r"6 rows cannot be cut into groups of 4; .* \[2, 3, 6\]", lambda: per_block(4, 4).scale_shape(6, 12)),
    ("12 columns cannot be cut into groups of 5", lambda: extrema(X, per_group(5))),
    ("12 columns cannot be cut into groups of 5", lambda: qparams_of(X, spec(granularity=per_group(5)))),
    (
        "12 columns cannot be cut into groups of 8",
        lambda: quantize(X, qparams_of(X, spec()), spec(granularity=per_group(8))),
    ),
    (
        "12 columns cannot be cut into groups of 8",
        lambda: fake_quantize(X, qparams_of(X, spec()), spec(granularity=per_group(8))),
    ),
    (
        'uint4 has no negative values: use scale_rule="affine"',
        lambda: spec(format=IntFormat(4, signed=False)),
    ),
    ('e2m1: scale_rule="affine" adds a zero point', lambda: spec(format=E2M1, scale_rule="affine")),
    (
        "signed-max gives negative scales, which e8m0 cannot hold",
        lambda: spec(scale_rule="signed-max", scale_format=E8M0),
    ),
    ("FixedFormat: 0 of 8 bits behind the point asked; 1 to 7 are possible", lambda: FixedFormat(8, 0)),
    ("FixedFormat: 8 of 8 bits behind the point asked", lambda: FixedFormat(8, 8)),
    ("IntFormat: 9 bits asked", lambda: FixedFormat(9, 3)),
    (
        r'FloatFormat: e1m0 with specials="nan" has no number above 0',
        lambda: FloatFormat(1, 0, specials="nan"),
    ),
    ("mine: 1 levels asked; 2 to 256 are possible", lambda: LevelFormat("mine", (1.0,))),
    ("mine: levels ascend in float32 and are finite", lambda: LevelFormat("mine", (0.0, 1e-60))),
    ("mine: levels ascend in float32 and are finite", lambda: LevelFormat("mine", (0.0, float("inf")))),
    ("mine: no level is positive, the largest is -1.0", lambda: LevelFormat("mine", (-2.0, -1.0))),
    ("StretchedFormat: 2 levels asked; 3 to 100 are possible", lambda: StretchedFormat(2)),
    (
        "positive has no negative values",
        lambda: spec(format=LevelFormat("positive", (0.5, 1.0)), scale_rule="amax"),
    ),
    (
        'fixed8.6: scale_rule="affine" adds a zero point, which only integers have',
        lambda: spec(format=FixedFormat(8, 6), scale_rule="affine"),
    ),
    (
        "min-max gives negative offsets, which e8m0 cannot hold",
        lambda: spec(scale_rule="min-max", scale_format=E8M0),
    ),
    (
        "min-max stores an offset beside each scale, which a global scale does not reach",
        lambda: spec(scale_rule="min-max", global_scale=True),
    ),
    (
        "four-over-six is a choice between two values of e2m1; int4 asked",
        lambda: spec(scale_rule="four-over-six"),
    ),
    (
        "pow2: a learned scale leaves the powers of two where e8m23 stores it; use scale_format=E8M0",
        lambda: spec(scale_rule="pow2", ranges="learned"),
    ),
    (
        "four-over-six chooses scales by a block's values, and here are only its extrema; use qparams_of",
        lambda: choose_qparams(-X[:1, :1], X[:1, :1], spec(format=E2M1, scale_rule="four-over-six")),
    ),
    ("e5m10 has 16 bits: a code is one byte, 8 at most", lambda: spec(format=FLOAT16)),
]


@pytest.mark.parametrize(("message", "mistake"), MISTAKES, ids=[message[:60] for message, _ in MISTAKES])
def test_mistakes(message: str, mistake: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message):
        mistake()


def test_every_rule_is_named_where_one_is_unknown() -> None:
    # Under the tests' own type checks a wrong literal never arrives; without them, as for users, it does.
    wrong = object.__new__(QuantSpec)
    for name, value in vars(spec()).items():
        object.__setattr__(wrong, name, value)
    object.__setattr__(wrong, "scale_rule", "max")
    with pytest.raises(
        ValueError, match=r"scale rule 'max' asked; there are half-range, narrow, .*, four-over-six"
    ):
        wrong.__post_init__()
