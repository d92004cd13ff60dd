"""Which tensors get which numbers: schemes, presets, recipes, plans. Data only, no tensors."""

from recoup.schemes.limit import Limit
from recoup.schemes.parse import parse
from recoup.schemes.plan import Plan
from recoup.schemes.presets import PRESETS, preset
from recoup.schemes.recipe import Recipe, Rule
from recoup.schemes.scheme import Scheme
from recoup.schemes.training import TrainSettings

__all__ = ["PRESETS", "Limit", "Plan", "Recipe", "Rule", "Scheme", "TrainSettings", "parse", "preset"]
