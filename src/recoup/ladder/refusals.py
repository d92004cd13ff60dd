"""What a run refuses before it measures anything: data that will not do, rungs that cannot be climbed."""

import copy
import os
from collections.abc import Sequence

from torch import nn

from recoup.calibrate.as_one import check_batches
from recoup.calibrate.biases import SAMPLES, check_biases
from recoup.calibrate.gptq import check_layers
from recoup.nn import Batch, size_of, take
from recoup.prepare import prepare
from recoup.schemes import Plan, Recipe
from recoup.train import (
    check_batch_norm,
    check_lora,
    check_progressive,
    check_scales,
    check_state,
    check_training,
)


def check_data(recipe: Recipe, calibration: Sequence[Batch], train: Sequence[Batch]) -> None:
    """Is there as much as the recipe asks for, in one process?

    Raises:
        ValueError: there is not.
    """
    if "qat" in recipe.rungs and len(train) < 2:
        raise ValueError(
            f"the rung qat needs at least 2 training batches, one of them held out; found {len(train)}"
        )
    found = sum(map(size_of, calibration))
    if found < recipe.calibration.samples:
        raise ValueError(
            f"calibration: {recipe.calibration.samples} samples asked, {found} found; "
            "bring more, or ask for fewer"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("recover writes one folder from one process; under torchrun call recoup.train")


def check_rungs(
    model: nn.Module, plan: Plan, recipe: Recipe, calibration: Sequence[Batch], train: Sequence[Batch]
) -> None:
    """Can the model be prepared, and every rung of the recipe be climbed then? Changes nothing.

    Raises:
        ValueError: a rung would refuse the model, its settings or the batches.
    """
    trial = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    prepare(trial, plan, impl=recipe.impl)  # shares every weight, so the trial costs no memory
    if "gptq" in recipe.rungs:
        check_state(model)
        check_layers(trial)
        check_batches(list(take(calibration, recipe.calibration.samples)), "gptq")
    if "bias" in recipe.rungs:
        check_state(model)
        check_biases(trial)
        check_batches(list(take(calibration, SAMPLES)), "bias")
    if "qat" in recipe.rungs:
        check_training(model, train[0], recipe.train)
        check_progressive(trial, recipe.train.progressive)
        if recipe.train.batch_norm is not None:
            check_batch_norm(trial)
        if recipe.train.lora is not None:
            check_lora(trial, recipe.train.lora)
        if recipe.train.parameters == "scales":
            check_scales(trial, "parameters: scales")
        if recipe.train.freeze_ranges is not None:
            check_scales(trial, "freeze_ranges")
