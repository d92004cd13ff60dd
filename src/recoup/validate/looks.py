"""A look at quantized tensors: a sample of each, small enough to be kept beside the model that trains.

A sample is whole blocks, evenly spread, about `SAMPLE` values of a tensor; of long blocks it is a part of
their rows. What is counted in it is exact for the sample and an estimate for the rest.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from recoup.nn import (
    Batch,
    FakeQuantizer,
    NonFiniteError,
    call,
    is_prepared,
    low_rank_of,
    matrices_of,
    quantizers_of,
)
from recoup.nn import cut as cut_batch
from recoup.numerics import QParams
from recoup.numerics.granularity import Granularity, cut
from recoup.numerics.quantize import position, shift_up

SAMPLE = 2**14
_BLOCKS = 8  # at least, where there are so many
_SAMPLES = 2  # of a batch


@dataclass(frozen=True, kw_only=True)
class Look:
    """A sample of one quantized tensor at one moment.

    Args:
        quantizer: of the tensor.
        trained: it is a weight that an optimizer may move.
        position: the values in units of the grid, before rounding; (blocks, values of a block).
        scale: all of it where it is learned; None where it is not.
    """

    quantizer: FakeQuantizer
    trained: bool
    position: Tensor
    scale: Tensor | None

    @cached_property
    def values(self) -> Tensor:
        """Of the grid, one for each code."""
        grid = self.quantizer.spec.format
        return grid.rint(self.position).clamp(grid.lo, grid.hi)

    @property
    def saturated(self) -> float:
        """The share of the values that lie beyond the grid."""
        return float((self.quantizer.spec.format.rint(self.position) != self.values).float().mean())


@torch.no_grad()
def looks(model: nn.Module, batch: Batch | None) -> Mapping[str, Look]:
    """At every weight, and at what a batch brings to static and learned quantizers; by the tensor's name.

    Dynamic ranges fit whatever comes, so inputs that have them are not looked at; nor is a weight that is
    spread over devices. The model runs once, in evaluation mode, if there is an input to look at. Never
    changes it.

    Args:
        model: prepared and calibrated.
        batch: where the model is, of which a few samples do; None looks at weights alone.
    """
    found: dict[str, Look] = {}
    for module in model.modules():
        adapter = low_rank_of(module)
        if any(map(_is_spread, module.parameters(recurse=False))) or not is_prepared(module):
            continue
        quantizers = quantizers_of(module)
        for name, matrix in matrices_of(module).items():
            moved_by = getattr(module, name), *(() if adapter is None else (adapter.A, adapter.B))
            trained = any(parameter.requires_grad for parameter in moved_by)
            found[quantizers[name].path] = _look(quantizers[name], matrix, trained=trained)

    def see(quantizer: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(quantizer, FakeQuantizer)
        if inputs[0].numel():
            found.setdefault(quantizer.path, _look(quantizer, inputs[0], trained=False))

    seen = [
        module
        for module in model.modules()
        if isinstance(module, FakeQuantizer) and not module.is_weight and module.spec.ranges != "dynamic"
    ]
    if batch is None or not seen:
        return found
    modes = {module: module.training for module in model.modules()}
    handles = [quantizer.register_forward_pre_hook(see) for quantizer in seen]
    try:
        for module in modes:
            module.training = False  # also where `eval` does nothing, and statistics would be moved
        with suppress(NonFiniteError):  # which whoever trains or evaluates says with more to it
            call(model, _few(batch))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return found


def _few(batch: Batch) -> Batch:
    """Some samples, where a batch holds nothing but samples; else all of it, as of a graph with its edges."""
    held = [batch] if isinstance(batch, Tensor) else batch.values() if isinstance(batch, Mapping) else batch
    sizes = {value.shape[0] if isinstance(value, Tensor) and value.ndim else None for value in held}
    return cut_batch(batch, _SAMPLES) if len(sizes) == 1 and None not in sizes else batch


def _is_spread(parameter: Tensor) -> bool:
    """FSDP's parameters are DTensors, and ZeRO's are empty between the steps."""
    return hasattr(parameter, "device_mesh") or not parameter.numel()


def _look(quantizer: FakeQuantizer, x: Tensor, *, trained: bool) -> Look:
    view, spec = quantizer.view(x.detach()), quantizer.spec
    blocks = cut(view, spec.granularity)
    down, rows, across, columns = blocks.shape
    count = min(down * across, max(_BLOCKS, SAMPLE // (rows * columns)))
    index = torch.arange(count, device=view.device) * (down * across) // count
    places = index // across, index % across
    sample = blocks[:, :: max(1, rows * columns * count // SAMPLE)][places[0], :, places[1]]
    qparams = quantizer.qparams(view)
    of_sample: dict[str, Any] = {
        name: value[places][:, None] if value is not None and value.ndim == 2 else value
        for name, value in vars(qparams).items()
    }
    lattice = replace(spec, granularity=Granularity(rows=sample.shape[1], columns=columns))
    found = position(sample.flatten(0, 1), QParams(**of_sample), lattice)
    return Look(
        quantizer=quantizer,
        trained=trained,
        position=shift_up(found, QParams(**of_sample)).flatten(1),
        scale=quantizer.scale.detach().clone() if isinstance(quantizer.scale, nn.Parameter) else None,
    )
