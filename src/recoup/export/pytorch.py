"""A torch.export program: a converted model becomes model.pt2, of operators that torch itself has.

The model is traced with modules in place of the coded ones that hold codes and scales as they were trained
and compute with torch's operators (`pytorch_modules.py`). Nothing decomposes, folds or fuses the program
afterwards: what was traced is what is written, and what runs.

Into the file goes no pickle: tensors are raw bytes, the graph is JSON, and the batch it was traced with and
the places in somebody's source that the operators came from are left out.
"""

import io
import json
import logging
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from recoup.engines.pytorch import FILE, NOTES
from recoup.export import pytorch_modules
from recoup.export.tracing import check_no_bag, first_two, free_axes, output_names, positional
from recoup.nn import Batch, evaluating, is_coded
from recoup.schemes import Scheme

_DTYPES = (torch.float32, torch.bfloat16)


def check(model: nn.Module, modules: Mapping[str, tuple[Scheme, type]]) -> None:
    """Can torch's operators compute these schemes?

    Args:
        model: any; whether it can be traced is found when it is.
        modules: what is quantized: the scheme and the type of the converted module, by name.

    Raises:
        ValueError: they cannot; names the module.
    """
    del model
    for path, (scheme, kind) in modules.items():
        check_no_bag(path, kind)
        pytorch_modules.check(path, scheme)


def write(model: nn.Module, folder: Path, example: Batch) -> None:
    """Write `model` as folder/model.pt2; a float model is written as it is.

    Batch size and the lengths of token sequences stay free wherever the model itself leaves them free.

    Args:
        model: converted, or float; in float32, or cast to bfloat16 after its conversion. Its mode is set to
            eval for the tracing, and put back.
        folder: exists.
        example: one batch, to trace with; its first two samples are enough.

    Raises:
        ValueError: the model returns something other than tensors, is in another dtype, or cannot be traced.
    """
    other = [n for n, p in model.named_parameters() if p.is_floating_point() and p.dtype not in _DTYPES]
    if other:
        raise ValueError(
            f"pytorch: {other[0]} is neither float32 nor bfloat16; call model.float() before recoup.prepare"
        )
    values = example.values() if isinstance(example, Mapping) else positional(example)
    if not all(isinstance(value, Tensor) for value in values):
        raise ValueError(
            "pytorch: the example holds values that are no tensors; a program has only tensors as inputs"
        )
    example = first_two(example)
    with evaluating(model):
        outputs = output_names(model, example, "pytorch")
        with _opened(model) as places, _named(model, outputs):
            program = _trace(model, example)
    notes = {
        "inputs": list(example) if isinstance(example, Mapping) else [],
        "outputs": outputs,
        "calls": [call._asdict() for call in _calls(program, places)],
    }
    _strip(program)
    # Through memory: on a disk that is full, torch's own writer ends the process.
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={NOTES: json.dumps(notes)})
    (folder / FILE).write_bytes(content.getbuffer())


@torch.no_grad()
def _trace(model: nn.Module, example: Batch) -> torch.export.ExportedProgram:
    args, kwargs = ((), dict(example)) if isinstance(example, Mapping) else (positional(example), {})
    free = {name: free_axes(value) for name, value in kwargs.items()} or tuple(map(free_axes, args))
    log = logging.getLogger("torch.export")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about its own deprecated calls
            return torch.export.export(model, args, kwargs, dynamic_shapes=free)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"pytorch: torch.export cannot trace the model: {reason}") from error
    finally:
        log.setLevel(level)


@contextmanager
def _opened(model: nn.Module) -> Generator[frozenset[str]]:
    """Coded modules replaced by those that are traced; the places where they stand."""
    places: dict[str, Any] = {
        place: module for place, module in model.named_modules(remove_duplicate=False) if is_coded(module)
    }
    processor = pytorch_modules.Processor()

    def forget(*_: Any) -> None:
        processor.forget()

    traced = {module: pytorch_modules.opened(module, processor).eval() for module in set(places.values())}
    for place, module in places.items():
        model.set_submodule(place, traced[module])
    hook = model.register_forward_pre_hook(forget)
    try:
        yield frozenset(places)
    finally:
        hook.remove()
        for place, module in places.items():
            model.set_submodule(place, module)


@contextmanager
def _named(model: nn.Module, names: list[str]) -> Generator[None]:
    """The model returns a plain dict, so that a reader needs no library of the model's."""

    def name(_: nn.Module, __: Any, output: Any) -> Any:
        if names == [""]:
            return output
        values = output.values() if isinstance(output, Mapping) else output
        return dict(zip(names, values, strict=True))

    hook = model.register_forward_hook(name)
    try:
        yield
    finally:
        hook.remove()


class Call(NamedTuple):
    """One call of a quantized module, by its program's nodes.

    Args:
        module: its path.
        entry: the first node that takes the call's input, whose own name a reader may change.
        place: of that input among the nodes that `entry` takes.
        output: what the call returns.
    """

    module: str
    entry: str
    place: int
    output: str


def _calls(program: torch.export.ExportedProgram, places: frozenset[str]) -> list[Call]:
    """Every call of a module at these places, with the values that go in and come out."""
    nodes: dict[tuple[str, str], list[fx.Node]] = {}
    for node in program.graph.nodes:
        for key, (place, _) in node.meta.get("nn_module_stack", {}).items():
            if place in places:
                nodes.setdefault((place, key), []).append(node)
    calls: list[Call] = []
    stored = {node for node in program.graph.nodes if node.op == "placeholder"} - _user_inputs(program)
    for (path, _), inside in nodes.items():
        members = set(inside)
        entering = [
            source
            for node in inside
            for source in node.all_input_nodes
            if source not in members | stored and _is_data(source)
        ]
        leaving = [node for node in inside if any(user not in members for user in node.users)]
        leaving = [node for node in leaving if isinstance(node.meta.get("val"), Tensor) and _is_data(node)]
        if len(set(entering)) != 1 or not leaving:
            raise ValueError(f"pytorch: {path}: torch.export does not trace its call as one piece")
        entry = next(node for node in inside if entering[0] in node.all_input_nodes)
        place = entry.all_input_nodes.index(entering[0])
        calls.append(Call(module=path, entry=entry.name, place=place, output=leaving[-1].name))
    return calls


def _user_inputs(program: torch.export.ExportedProgram) -> set[fx.Node]:
    names = set(program.graph_signature.user_inputs)
    return {node for node in program.graph.nodes if node.op == "placeholder" and node.name in names}


def _is_data(node: fx.Node) -> bool:
    """A tensor, and not the answer about the processor."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype != torch.bool


def _strip(program: torch.export.ExportedProgram) -> None:
    """Without the traced batch, which would be pickled, and without paths and lines of source files.

    The guards go too, since they are Python that a reader executes; that inputs have the traced shapes, but
    for the free axes, is checked from the placeholders as well.
    """
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                for name in (
                    "stack_trace",
                    "nn_module_stack",
                    "torch_fn",
                    "source_fn_stack",
                    "from_node",
                    "custom",
                ):
                    node.meta.pop(name, None)
    program._example_inputs = None  # pyright: ignore[reportPrivateUsage]
    program._guards_code = []  # pyright: ignore[reportPrivateUsage]
