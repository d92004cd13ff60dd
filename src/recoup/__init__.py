"""recoup recovers the quality that quantization costs."""

from recoup.calibrate import calibrate
from recoup.convert import convert
from recoup.numerics import QuantSpec
from recoup.prepare import explain, prepare, resolve
from recoup.schemes import Plan, Recipe, Rule, Scheme

__all__ = [
    "Plan",
    "QuantSpec",
    "Recipe",
    "Rule",
    "Scheme",
    "calibrate",
    "convert",
    "explain",
    "prepare",
    "resolve",
]
