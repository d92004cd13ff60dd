"""What a number is: formats, granularities, scales, and the rounding between them.

Pure functions on 2-D tensors; this room imports torch and nothing of recoup. Read `formats.py`,
`granularity.py`, `scale_rules.py`, `spec.py`, `quantize.py` and `fake_quantize.py`, in that order.
"""

from recoup.numerics.fake_quantize import fake_quantize
from recoup.numerics.formats import (
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
    Format,
    IntFormat,
    PowerOfTwo,
)
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
from recoup.numerics.quantize import (
    choose_global_scale,
    choose_qparams,
    dequantize,
    qparams_of,
    quantize,
)
from recoup.numerics.scale_rules import SCALE_RULES, ScaleRule
from recoup.numerics.spec import QParams, QuantSpec, Ranges, storable, storable_straight_through

__all__ = [
    "BFLOAT16",
    "E2M1",
    "E2M3",
    "E3M2",
    "E4M3",
    "E5M2",
    "E8M0",
    "FLOAT16",
    "FLOAT32",
    "SCALE_RULES",
    "FloatFormat",
    "Format",
    "Granularity",
    "IntFormat",
    "PowerOfTwo",
    "QParams",
    "QuantSpec",
    "Ranges",
    "ScaleRule",
    "choose_global_scale",
    "choose_qparams",
    "dequantize",
    "divisors",
    "extrema",
    "fake_quantize",
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
