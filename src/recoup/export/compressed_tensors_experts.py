"""Layers of experts in compressed-tensors folders: a quantized Linear for every matrix of every expert.

So llm-compressor writes them, vLLM joins them to stacks of its own, and transformers decodes them into its.
The names are those of the model's checkpoints, from `recoup.engines.transformers_experts`.
"""

import copy
import re
from collections.abc import Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from recoup.engines.transformers_experts import Place, places, set_linears
from recoup.nn import CodedExperts, CodedLinear, Codes, ExpertsOfLinears, routers
from recoup.numerics import QParams


def check_names(model: nn.Module, linears: Iterable[str]) -> None:
    """Have checkpoints of a model with experts its Linears under their own names?

    Raises:
        ValueError: transformers would save one under another; names both.
    """
    for name, stored in _stored_names(model, linears).items():
        if stored != name:
            raise ValueError(
                f"{name}: checkpoints of {type(model).__name__} call it {stored}, and config.json has one "
                f"name for each module; keep it with {{match: {name}, scheme: none}}, or take another target"
            )


def as_linears(model: nn.Module) -> nn.Module:
    """A copy of a converted model, whose experts are coded Linears under the names of checkpoints.

    It shares every tensor. A model without experts is itself.
    """
    experts = [path for path, module in model.named_modules() if isinstance(module, CodedExperts)]
    if not experts:
        return model
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, tensors)
    for path in experts:
        layer: Any = copied.get_submodule(path)
        set_linears(copied, path, places(model, path, layer), partial(_linear, layer))
    return copied


def targets_of(model: nn.Module) -> dict[str, str]:
    """What config.json calls the experts' Linears where a group names them, by their own names.

    One expression for a layer: vLLM looks for experts as gate_proj, up_proj and down_proj whatever their
    names are, and transformers for an expression with "experts" in it.
    """
    found: dict[str, str] = {}
    linears = {id(module): path for path, module in model.named_modules()}
    for module in model.modules():
        if isinstance(module, ExpertsOfLinears):
            for linear in (one for each in module.linears.values() for expert in each for one in expert):
                path = linears[id(linear)]
                found[path] = f"re:{re.escape(path.rsplit('.', 2)[0])}[.].*"
    return found


def routers_of(model: nn.Module) -> list[str]:
    """The routers, which are no Linears here and are in vLLM, by their names here and in checkpoints."""
    names = _stored_names(model, sorted(routers(model)))
    return list(dict.fromkeys([*names, *names.values()]))


def _stored_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """What checkpoints call modules with a `weight`."""
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, str] = {}
    for name in names:
        shown: Any = {f"{name}.weight": torch.zeros(2, 2)}
        (key,) = revert_weight_conversion(cast(Any, model), shown)
        found[name] = key.removesuffix(".weight")
    return found


def _linear(experts: Any, name: str, place: Place) -> CodedLinear:
    """A matrix of a stack: its codes, and the scales of its rows.

    Blocks of several rows end where it does: they are squares, and cut the columns of `down_proj`, too.
    """
    del name
    stack: Codes = getattr(experts, place.stack)
    spec, scale = experts.scheme.weights, stack.scale
    if spec.granularity.rows is None:  # one for each expert, which its parts share
        scale = scale.repeat_interleave(place.parts, dim=0)
    each, index = (experts.num_experts * place.parts, -1), place.expert * place.parts + place.part
    codes, scale = (tensor.unflatten(0, each)[index] for tensor in (stack.codes, scale))
    prepared: Any = SimpleNamespace(
        scheme=experts.scheme,
        in_features=codes.shape[1],
        out_features=codes.shape[0],
        bias=None,
        bias_codes=None,
        input_quantizer=getattr(experts, f"{place.stack}_input_quantizer"),
    )
    qparams = QParams(scale=scale, global_scale=stack.global_scale)
    return CodedLinear(prepared, Codes(codes, qparams, spec, stack.dtype)).eval()
