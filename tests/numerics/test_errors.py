"""Every mistake a user can make here, and the message that says what to do instead."""

from collections.abc import Callable

import pytest
import torch

from recoup.numerics import (
    E2M1,
    E8M0,
    FLOAT16,
    FloatFormat,
    Granularity,
    IntFormat,
    QuantSpec,
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
    with pytest.raises(ValueError, match=r"scale rule 'max' asked; there are half-range, narrow, .*, rceil"):
        wrong.__post_init__()
