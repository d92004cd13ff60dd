"""Post-training quantization in one call, without a run."""

from collections.abc import Iterable

from torch import nn

from recoup.calibrate import calibrate
from recoup.nn import DEFAULT_SAMPLES, Batch, take
from recoup.prepare import prepare, resolve
from recoup.schemes import Recipe, Scheme
from recoup.transforms import smooth, untie


def ptq(
    model: nn.Module, scheme: Recipe | Scheme | str, batches: Iterable[Batch], *, observer: str = "mse"
) -> nn.Module:
    """Post-training quantization in one call: resolve, prepare, calibrate; in place, returns the model.

    Args:
        model: float.
        scheme: a preset's name, a scheme or a recipe, of which rungs, gates and export are not asked.
        batches: up to 512 samples are looked at.
        observer: see `calibrate`.

    Raises:
        ValueError: see `resolve`, `calibrate`, and `smooth` and `untie` in `recoup.transforms`.

    >>> import torch
    >>> model = ptq(torch.nn.Sequential(torch.nn.Linear(32, 4)), "w4a8", [torch.randn(8, 32)])
    >>> model[0].scheme.name
    'w4a8'
    """
    seen = list(take(batches, DEFAULT_SAMPLES))
    if isinstance(scheme, Recipe) and scheme.untie:
        untie(model)
    plan = resolve(model, scheme)
    if isinstance(scheme, Recipe) and scheme.smooth:
        smooth(model, plan, seen)
    return calibrate(prepare(model, plan), seen, observer=observer)
