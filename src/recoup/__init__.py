"""recoup recovers the quality that quantization costs."""

from recoup.calibrate import calibrate
from recoup.convert import convert
from recoup.explain import explain
from recoup.export import export
from recoup.ladder import Result, ptq, recover
from recoup.numerics import QuantSpec
from recoup.prepare import prepare, resolve
from recoup.schemes import Plan, Recipe, Rule, Scheme, TrainSettings
from recoup.train import param_groups, train
from recoup.validate import Gate, Samples, Verdict

__all__ = [
    "Gate",
    "Plan",
    "QuantSpec",
    "Recipe",
    "Result",
    "Rule",
    "Samples",
    "Scheme",
    "TrainSettings",
    "Verdict",
    "calibrate",
    "convert",
    "explain",
    "export",
    "param_groups",
    "prepare",
    "ptq",
    "recover",
    "resolve",
    "train",
]
