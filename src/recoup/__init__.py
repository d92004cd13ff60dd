"""recoup recovers the quality that quantization costs."""

from importlib import import_module
from types import ModuleType

from recoup.calibrate import calibrate
from recoup.convert import convert
from recoup.explain import explain
from recoup.export import export
from recoup.ladder import Result, ptq, recover
from recoup.numerics import QuantSpec
from recoup.prepare import prepare, resolve
from recoup.schemes import Plan, Recipe, Rule, Scheme, TrainSettings
from recoup.train import (
    add_batch_norm,
    add_lora,
    load_lora,
    merge_batch_norm,
    merge_lora,
    param_groups,
    save_lora,
    train,
)
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
    "add_batch_norm",
    "add_lora",
    "calibrate",
    "convert",
    "explain",
    "export",
    "load_lora",
    "merge_batch_norm",
    "merge_lora",
    "param_groups",
    "prepare",
    "ptq",
    "recover",
    "resolve",
    "save_lora",
    "train",
]


def __getattr__(name: str) -> ModuleType:
    """`recoup.hf`, when it is asked for: it imports transformers."""
    if name == "hf":
        return import_module("recoup.hf")
    raise AttributeError(f"module 'recoup' has no attribute {name!r}")
