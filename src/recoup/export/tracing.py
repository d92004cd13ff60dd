"""What every target that traces a model asks of a batch and of the outputs."""

import traceback
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from recoup.nn import CODED_MODULES, Batch, CodedEmbeddingBag, call, size_of

_INSTEAD = {"output_size": "give it the output_padding that comes to this size"}


@dataclass(frozen=True, kw_only=True)
class Traced:
    """What torch traces, and what the values of the file are called.

    Args:
        module: the model, or a closed form of it; called with `args` and `kwargs`.
        args: by position.
        kwargs: by name.
        free: the axes that stay free, in the structure of `args` or `kwargs`, as torch.export takes it.
        inputs: names; None for those of the module's own parameters.
        outputs: names; [""] for a module that returns one bare tensor.
        prefix: of the model's own names in `module`.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    free: Any
    inputs: list[str] | None
    outputs: list[str]
    prefix: str = ""


def traced(model: nn.Module, example: Batch, target: str) -> Traced:
    """A model as it is, with the batch that it is traced with.

    Raises:
        ValueError: an output is not a tensor.
    """
    args, kwargs = ((), dict(example)) if isinstance(example, Mapping) else (positional(example), {})
    free = {name: free_axes(value) for name, value in kwargs.items()} or tuple(map(free_axes, args))
    outputs = output_names(model, example, target)
    return Traced(module=model, args=args, kwargs=kwargs, free=free, inputs=None, outputs=outputs)


@torch.no_grad()
def output_names(model: nn.Module, example: Batch, target: str) -> list[str]:
    """The names of a model's outputs; [""] for a model that returns one bare tensor.

    Raises:
        ValueError: an output is not a tensor.
    """
    with _of_inputs_alone(model, target):
        result = call(model, example)
    if isinstance(result, Tensor):
        return [""]
    named: Mapping[str, Any] = {"": result}
    if isinstance(result, Mapping):
        named = result
    elif isinstance(result, (list, tuple)):
        named = {str(index): value for index, value in enumerate(result)}
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{target}: output {name!r} is a {type(value).__name__}; a file has only tensors as outputs, "
                "so the model must return nothing else (no cache: model.config.use_cache = False)"
            )
    return list(named)


def check_no_bag(path: str, kind: type) -> None:
    """A program and an ONNX graph hold no EmbeddingBag: bags begin where another input says.

    Raises:
        ValueError: it is one; says what to do.
    """
    if issubclass(kind, CodedEmbeddingBag):
        raise ValueError(
            f"{path}: a quantized EmbeddingBag has no form in this target; keep it with "
            f"{{match: {path}, scheme: none}}, or build it of an nn.Embedding and the sum of its vectors"
        )


@contextmanager
def _of_inputs_alone(model: nn.Module, target: str) -> Generator[None]:
    """Files hold quantized modules that are functions of their input.

    Raises:
        ValueError: one is called with more; names it, and what.
    """

    def refuse(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(signature(module.forward).parameters, args, strict=False)) | kwargs
        for name, value in list(given.items())[1:]:
            if value is not None:
                raise ValueError(
                    f"{target}: {names[module]} is called with {name} beside its input, and a quantized "
                    f"{type(module).__name__.removeprefix('Coded')} is written as a function of that alone; "
                    f"{_INSTEAD.get(name, 'leave it out')}, or keep it with "
                    f"{{match: {names[module]}, scheme: none}}"
                )

    paths = dict(model.named_modules())
    names = {module: path for path, module in paths.items() if type(module) in CODED_MODULES.values()}
    handles = [module.register_forward_pre_hook(refuse, with_kwargs=True) for module in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def free_axes(value: Any) -> dict[int, Any] | None:
    """The batch axis, and the lengths of sequences; an image's height and width are part of its model."""
    if not isinstance(value, Tensor):
        return None
    axes = range(value.ndim) if value.ndim < 4 else [0]
    return dict.fromkeys(axes, torch.export.Dim.AUTO)


def first_two(batch: Batch) -> Batch:
    """Two samples: a batch of one would be traced as a constant."""
    size = size_of(batch)

    def two(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != size:
            return value
        return value[:2] if size > 1 else torch.cat([value, value])

    if isinstance(batch, Mapping):
        return {name: two(value) for name, value in batch.items()}
    return two(batch) if isinstance(batch, Tensor) else tuple(map(two, batch))


def positional(batch: Batch) -> tuple[Any, ...]:
    """A batch that is no mapping, as the arguments of a call."""
    return (batch,) if isinstance(batch, Tensor) else tuple(batch)


def untraceable(model: nn.Module, error: BaseException) -> str:
    """One line for a model that torch could not trace: which module it was in, and why.

    Tracing runs the model, so the innermost of its modules whose call stands in a traceback is the one; where
    an operator of the finished trace has no translation, the traceback has its node, which knows the module.
    """
    names = {id(module): name for name, module in model.named_modules()}
    inside, causes = "", [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    for frame, _ in (step for cause in causes for step in traceback.walk_tb(cause.__traceback__)):
        called, node = frame.f_locals.get("self"), frame.f_locals.get("node")
        if id(called) in names:
            inside = names[id(called)]
        elif isinstance(node, torch.fx.Node) and (stack := node.meta.get("nn_module_stack")):
            path = list(stack.values())[-1][0]
            inside = path if path in names.values() else inside
    reason = next((line.strip() for line in str(causes[-1]).splitlines() if line.strip()), "no reason given")
    where = f"{inside} ({type(model.get_submodule(inside)).__name__})" if inside else "the model"
    return (
        f"{where} cannot be traced: {type(causes[-1]).__name__}: {reason}; change that module, or choose a "
        "target that does not trace (compressed-tensors, gguf)"
    )
