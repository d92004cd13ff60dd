"""Modules that share one Parameter, and what a plan may do to them: the same to all, or nothing."""

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, nn

from recoup.nn.modules import quant_type
from recoup.nn.twin import QuantModule, weight_names, weight_of
from recoup.schemes import PRESETS, Plan, Scheme


def shared_parameters(model: nn.Module) -> list[list[str]]:
    """Of every Parameter that several modules hold, all its paths."""
    paths: dict[Tensor, list[str]] = {}
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            paths.setdefault(parameter, []).append(f"{name}.{leaf}".lstrip("."))
    return [held for held in paths.values() if len(held) > 1]


def tied_weights(model: nn.Module) -> dict[str, list[str]]:
    """For every module whose weight others hold too, under whatever name, those others."""
    return {
        _name(path): [_name(other) for other in paths if _name(other) != _name(path)]
        for paths in shared_parameters(model)
        for path in paths
        if path.rpartition(".")[2] in leaves_of(model.get_submodule(path.rpartition(".")[0]))
    }


def check_tied(model: nn.Module, plan: Plan) -> None:
    """Are modules with one weight quantized alike?

    Raises:
        ValueError: they are not; names two, and what to write.
    """
    for name, others in tied_weights(model).items():
        for other in others if name in plan.modules else ():
            alike = _scheme_with_the_same_weights(
                model.get_submodule(name), plan[name], _holder(model, other)
            )
            if other not in plan.modules:
                difference = "which stays in float"
            elif plan[other].weights != plan[name].weights:
                difference = f"but {plan[name].name!r} and {plan[other].name!r} have different weights"
            elif alike is None:
                difference = "which reads it the other way round"
            else:
                continue
            remedy = f"write {{match: {other}, scheme: {alike}}} to quantize both alike, " if alike else ""
            raise ValueError(
                f"{name}: its weight is tied to that of {other}, {difference}; {remedy}write untie: true "
                "(recoup.transforms.untie) to give each its own, or keep both in float with scheme: none"
            )


def leaves_of(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's weights; without a quantized form, what it would be called."""
    kind = quant_type(module)
    return ("weight",) if kind is None else weight_names(kind, module)


def _name(path: str) -> str:
    """Of the module that holds a parameter; a parameter of the model itself goes by its own."""
    return path.rpartition(".")[0] or path


def _scheme_with_the_same_weights(module: nn.Module, scheme: Scheme, other: nn.Module) -> str | None:
    """The name of a scheme for a module that shares this one's weight; None if it cannot share the codes."""
    kind, other_kind = quant_type(module), quant_type(other)
    if kind is None or other_kind is None:
        return None
    views, seen_by_other = (
        {leaf: _lies(matrix, alike=kind is other_kind) for leaf, matrix in _matrices(*holder)}
        for holder in ((kind, module), (other_kind, other))
    )
    if views != seen_by_other:
        return None
    if scheme.inputs is None or other_kind.inputs_are != "ids":
        return scheme.name
    without_inputs = (
        preset.name
        for preset in PRESETS.values()
        if preset.inputs is None and replace(preset.weights, ranges=scheme.weights.ranges) == scheme.weights
    )
    return next(without_inputs, f"one with the weights of {scheme.name} and no inputs")


def _lies(matrix: Tensor, *, alike: bool) -> tuple[object, ...]:
    """What two views of one weight have in common; views by different types of module also the memory."""
    return (matrix.shape, matrix.stride()) if alike else (matrix.shape, matrix.stride(), matrix.data_ptr())


def _matrices(kind: type[QuantModule], module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for leaf in weight_names(kind, module):
        yield leaf, weight_of(kind, module, leaf).matrix


def _holder(model: nn.Module, name: str) -> nn.Module:
    """The module of that name; the model itself for the name of one of its own parameters."""
    return dict(model.named_modules()).get(name, model)
