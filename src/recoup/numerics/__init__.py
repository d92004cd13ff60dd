"""What a number is: formats, granularities, scales, and the rounding between them.

Pure functions on 2-D tensors; this room imports torch and nothing of recoup. Read `formats.py`,
`integers.py`, `floats.py`, `levels.py`, `granularity.py`, `scale_rules.py`, `spec.py`, `quantize.py`,
`stochastic.py`, `fake_quantize.py`, `learned.py` and `low_rank.py`, in that order.
"""

from recoup.numerics.fake_quantize import fake_quantize
from recoup.numerics.floats import (
    BFLOAT16,
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    E8M0,
    FLOAT16,
    FLOAT32,
    FloatFormat,
    PowerOfTwo,
)
from recoup.numerics.formats import Format, StepGradient
from recoup.numerics.granularity import (
    Granularity,
    divisors,
    extrema,
    per_block,
    per_channel,
    per_group,
    per_tensor,
    per_token,
)
from recoup.numerics.integers import MXINT8, FixedFormat, IntFormat
from recoup.numerics.learned import learned_qparams, storable_straight_through
from recoup.numerics.levels import BINARY, NF4, STRETCHED, TERNARY, LevelFormat, StretchedFormat
from recoup.numerics.low_rank import LowRank, merged
from recoup.numerics.quantize import (
    choose_global_scale,
    choose_qparams,
    dequantize,
    is_finite,
    qparams_of,
    quantize,
)
from recoup.numerics.scale_rules import SCALE_RULES, ScaleRule
from recoup.numerics.spec import ElementFormat, QParams, QuantSpec, Ranges, storable
from recoup.numerics.stochastic import drawn

__all__ = [
    "BFLOAT16",
    "BINARY",
    "E2M1",
    "E2M3",
    "E3M2",
    "E4M3",
    "E5M2",
    "E8M0",
    "FLOAT16",
    "FLOAT32",
    "MXINT8",
    "NF4",
    "SCALE_RULES",
    "STRETCHED",
    "TERNARY",
    "ElementFormat",
    "FixedFormat",
    "FloatFormat",
    "Format",
    "Granularity",
    "IntFormat",
    "LevelFormat",
    "LowRank",
    "PowerOfTwo",
    "QParams",
    "QuantSpec",
    "Ranges",
    "ScaleRule",
    "StepGradient",
    "StretchedFormat",
    "choose_global_scale",
    "choose_qparams",
    "dequantize",
    "divisors",
    "drawn",
    "extrema",
    "fake_quantize",
    "is_finite",
    "learned_qparams",
    "merged",
    "per_block",
    "per_channel",
    "per_group",
    "per_tensor",
    "per_token",
    "qparams_of",
    "quantize",
    "storable",
    "storable_straight_through",
]
