"""Layers that vLLM runs as one product: query, key and value; gate and up.

It joins their weights into one matrix, so they must have one scheme. With NVFP4 it also keeps one of their
global scales and reads all their blocks with it: siblings with global scales of their own would come out as
other numbers, without a word.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recoup.nn import CodedLinear, Codes, FakeQuantizer, QuantLinear
from recoup.numerics import storable
from recoup.schemes import Scheme

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


@torch.no_grad()
def share_global_scales(model: nn.Module) -> nn.Module:
    """Give fused siblings the largest of their global scales; in place, returns the model.

    The scales of the blocks are rounded again, so that every block keeps its step as nearly as it can. For a
    calibrated model, before it is measured or trained; never touches weights. Without global scales there is
    nothing to do.
    """
    for names in _siblings(model):
        modules = [model.get_submodule(name) for name in names]
        linears = [module for module in modules if isinstance(module, QuantLinear)]
        _share([linear.weight_quantizer for linear in linears])
        _share([linear.input_quantizer for linear in linears])
    return model


def check_fused(model: nn.Module, modules: Mapping[str, tuple[Scheme, Any]]) -> None:
    """Refuse what vLLM could not join.

    Args:
        model: float, or converted.
        modules: what is quantized, by name.

    Raises:
        ValueError: siblings with two schemes, or with two global scales; names them and the remedy.
    """
    for names in _siblings(model):
        schemes = {modules[name][0].name if name in modules else "none" for name in names}
        if len(schemes) > 1:
            raise ValueError(
                f"{', '.join(names)}: vLLM runs them as one product, and they have the schemes "
                f"{', '.join(sorted(schemes))}; give them one by rules"
            )
        coded = [module for name in names if isinstance(module := model.get_submodule(name), CodedLinear)]
        for holders in ([linear.weight for linear in coded], [linear.input_quantizer for linear in coded]):
            if len({float(scale) for _, scale in _with_global_scale(holders)}) > 1:
                raise ValueError(
                    f"{', '.join(names)}: vLLM runs them as one product with one global scale, and theirs "
                    "differ; call recoup.export.share_global_scales(model) after calibrate"
                )


def _siblings(model: nn.Module) -> Iterator[list[str]]:
    for path, parent in model.named_modules():
        children = dict(parent.named_children())
        for names in FUSED:
            found = [f"{path}.{name}".lstrip(".") for name in names if name in children]
            if len(found) > 1:
                yield found


def _share(quantizers: Sequence[nn.Module]) -> None:
    held = _with_global_scale(quantizers)
    if not held:
        return
    largest = torch.stack([scale for _, scale in held]).amax()
    for quantizer, own in held:
        if isinstance(quantizer, FakeQuantizer) and quantizer.scale is not None:
            moved = quantizer.scale * (own / largest)
            quantizer.scale.copy_(storable(moved, quantizer.spec.scale_format))
        own.copy_(largest)


def _with_global_scale(holders: Sequence[nn.Module]) -> list[tuple[nn.Module, Tensor]]:
    return [
        (holder, holder.global_scale)
        for holder in holders
        if isinstance(holder, (Codes, FakeQuantizer)) and holder.global_scale is not None
    ]
