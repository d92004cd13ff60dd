"""More bits for the few modules that cause most of the error: which, how far, and how a model gets them."""

import glob
import warnings
from collections.abc import Mapping
from itertools import islice

from torch import nn

from recoup.export import preflight
from recoup.export.fused import siblings
from recoup.ladder.tries import CAUSE, FEW, shares_of_error
from recoup.nn import FakeQuantizer
from recoup.numerics.kernels import Impl
from recoup.prepare import prepare, resolve
from recoup.schemes import Plan, Recipe, Rule
from recoup.schemes.presets import preset, ways_up


def raised_plan(model: nn.Module, recipe: Recipe, raised: Mapping[str, str]) -> Plan:
    """The plan of the recipe with more bits for some modules, as rules before its own would give them.

    Args:
        model: float.
        recipe: of the run.
        raised: module -> its preset.

    Raises:
        ValueError: the model, or the target, cannot have it.
    """
    rules = tuple(Rule(match=glob.escape(name), scheme=preset(scheme)) for name, scheme in raised.items())
    plan = resolve(model, recipe.model_copy(update={"rules": (*rules, *recipe.rules)}))
    settings = recipe.export
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they were said of the recipe's own plan
        preflight(
            model,
            plan,
            settings.target,
            tensor_parallel=settings.tensor_parallel,
            consumer=settings.consumer,
            gpu=settings.gpu,
        )
    return plan


def raised_further(
    model: nn.Module, recipe: Recipe, raised: Mapping[str, str], errors: Mapping[str, float]
) -> dict[str, str]:
    """Those modules that are raised, and the next few, which have most of the error; the same if none can be.

    A module gets the nearest preset of its family that has more bits and that the target can hold. Where it
    holds none for the module alone, as in engines that join query, key and value, its siblings come with it.

    Args:
        model: float.
        recipe: of the run.
        raised: module -> its preset, so far.
        errors: module -> relative error, as `layer_errors` finds it with those raised.
    """
    shares, found, covered = shares_of_error(errors), dict[str, str](), 0.0
    before = raised_plan(model, recipe, raised)
    for name, share in islice(shares.items(), max(1, round(FEW * len(shares)))):
        if covered >= CAUSE:
            break
        if name not in found:
            found |= _more_bits(model, recipe, before, {**raised, **found}, name)
        covered += share
    return {**raised, **found}


def give(model: nn.Module, plain: nn.Module, before: Plan, after: Plan) -> list[str]:
    """Put the twins of another plan in place of those that differ; in place, returns the names of these.

    Their inputs are uncalibrated then, where the ranges are static; nothing else is touched.

    Args:
        model: prepared with the plan before.
        plain: its float self, with the same Parameters.
        before: that plan.
        after: another one that quantizes the same modules.
    """
    changed = [name for name, scheme in after.modules.items() if before[name] != after.schemes[scheme]]
    impl: Impl = next(module.impl for module in model.modules() if isinstance(module, FakeQuantizer))
    for name in changed:
        model.set_submodule(name, plain.get_submodule(name))
    if changed:
        modules = {name: after.modules[name] for name in changed}
        prepare(model, Plan(schemes=after.schemes, modules=modules), impl=impl)
    return changed


def _more_bits(
    model: nn.Module, recipe: Recipe, before: Plan, raised: dict[str, str], name: str
) -> dict[str, str]:
    """The module, alone or with its siblings, and the nearest preset that the target holds; empty if none."""
    joined = next((names for names in siblings(model) if name in names), [name])
    for candidate in ways_up(before.modules[name]):
        for names in ([name], joined):
            further = dict.fromkeys(names, candidate.name)
            if not before.outputs.keys().isdisjoint(names):
                continue  # what an output is rounded to is its reader's affair too
            try:
                raised_plan(model, recipe, raised | further)
            except ValueError:
                continue  # the target cannot hold it so
            return further
    return {}
