"""Layers that vLLM runs as one product: query, key and value; gate and up.

It joins their weights into one matrix, so they must have one scheme. Where a whole tensor has one scale, it
keeps one of theirs: it reads all NVFP4 blocks with one global scale, and requantizes weights that have a
scale per tensor to the largest. Siblings with scales of their own would come out as other numbers, without a
word.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recoup.nn import CodedLinear, Codes, FakeQuantizer, QuantLinear
from recoup.numerics import QuantSpec, per_tensor, storable
from recoup.schemes import Scheme

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


@torch.no_grad()
def share_global_scales(model: nn.Module) -> nn.Module:
    """Give fused siblings the largest of their scales of whole tensors; in place, returns the model.

    Where that is a global scale, those of the blocks are rounded again, so that every block keeps its step as
    nearly as it can. For a calibrated model, before it is measured or trained; never touches weights. Without
    scales of whole tensors there is nothing to do.
    """
    for names in siblings(model):
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
        ValueError: siblings with two schemes, or with two scales of whole tensors, or with learned ones,
            which would part; names them and the remedy.
    """
    for names in siblings(model):
        schemes = {modules[name][0].name if name in modules else "none" for name in names}
        if len(schemes) > 1:
            raise ValueError(
                f"{', '.join(names)}: vLLM runs them as one product, and they have the schemes "
                f"{', '.join(sorted(schemes))}; give them one by rules"
            )
        learned = [spec for name in names if name in modules for spec in _learned_by_tensor(modules[name][0])]
        if learned:
            raise ValueError(
                f"{', '.join(names)}: vLLM runs them as one product with one scale per tensor, and learned "
                "ones would differ; use static ranges, or a scale per channel"
            )
        coded = [module for name in names if isinstance(module := model.get_submodule(name), CodedLinear)]
        for holders in ([linear.weight for linear in coded], [linear.input_quantizer for linear in coded]):
            if len({float(scale) for _, scale in _of_whole_tensors(holders)}) > 1:
                raise ValueError(
                    f"{', '.join(names)}: vLLM runs them as one product with one scale for the whole tensor, "
                    "and theirs differ; call recoup.export.share_global_scales(model) after calibrate"
                )


def siblings(model: nn.Module) -> Iterator[list[str]]:
    """The names of layers that vLLM joins, in its order."""
    for path, parent in model.named_modules():
        children = dict(parent.named_children())
        for names in FUSED:
            found = [f"{path}.{name}".lstrip(".") for name in names if name in children]
            if len(found) > 1:
                yield found


def _share(quantizers: Sequence[nn.Module]) -> None:
    held = _of_whole_tensors(quantizers)
    if not held:
        return
    largest = torch.stack([scale.reshape(()) for _, scale in held]).amax()
    for quantizer, own in held:
        blocks = quantizer.scale if isinstance(quantizer, FakeQuantizer) else None
        if blocks is not None and blocks is not own:
            blocks.copy_(storable(blocks * (own / largest), quantizer.spec.scale_format))
        own.copy_(largest)


def _of_whole_tensors(holders: Sequence[nn.Module]) -> list[tuple[Codes | FakeQuantizer, Tensor]]:
    """Those that have a scale for their whole tensor, with that scale."""
    found: list[tuple[Codes | FakeQuantizer, Tensor]] = []
    for holder in holders:
        if not isinstance(holder, (Codes, FakeQuantizer)):
            continue
        single = holder.spec.granularity == per_tensor
        scale = holder.global_scale if holder.spec.global_scale else holder.scale if single else None
        if scale is not None:
            found.append((holder, scale))
    return found


def _learned_by_tensor(scheme: Scheme) -> list[QuantSpec]:
    specs = [scheme.weights, *([scheme.inputs] if scheme.inputs else [])]
    return [spec for spec in specs if spec.ranges == "learned" and spec.granularity == per_tensor]
