"""ONNX for onnxruntime: a converted model becomes model.onnx with integer initializers.

torch.onnx traces the model with every quantized module closed, as one node that knows only its name; the
nodes of its lattice (`onnx_nodes.py`) are put in its place afterwards. So nothing between the trained
codes and the file can fold, reorder or round them.
"""

import io
import json
import logging
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recoup.engines.onnxruntime import OUTPUTS
from recoup.export import onnx_cache
from recoup.export.tracing import Traced, check_no_bag, first_two, positional, traced, untraceable
from recoup.nn import (
    OUTPUT,
    Batch,
    CodedConv,
    CodedConvTranspose,
    CodedEmbedding,
    CodedLinear,
    CodedModule,
    FakeQuantizer,
    is_coded,
    output_quantizer_of,
    quantize_output,
)
from recoup.schemes import Scheme

OPSET = 21
SCOPES = "pkg.torch.onnx.name_scopes"  # as torch writes it: a list of names, the node's own last
FILE = "model.onnx"
MODULES = "recoup.modules"  # like OUTPUTS a key of the file's metadata
TIED = "recoup.tied"
# In MODULES: in a key, after the path of a module that is called more than once; in an entry, the names of
# values, and of the module or quantizer whose lattice the codes of such a value are on.
AGAIN = " again "
INPUT, ADDED, RESULT, LATTICE_OF = "input", "added", "output", " on the lattice of"
_CLOSED = "QuantizedModule"
_LARGEST_SINGLE_FILE = 2**31 - 2**20  # protobuf's limit, with room for the graph


def check(model: nn.Module, modules: Mapping[str, tuple[Scheme, type]]) -> None:
    """Can onnxruntime compute these schemes?

    Args:
        model: any; whether it can be traced is found when it is.
        modules: what is quantized: the scheme and the type of the converted module, by name.

    Raises:
        ValueError: it cannot; names the module.
        ImportError: the extra is not installed.
    """
    from recoup.export import onnx_nodes

    del model
    for path, (scheme, kind) in modules.items():
        check_no_bag(path, kind)
        onnx_nodes.check(path, scheme, kind)


def write(
    model: nn.Module,
    folder: Path,
    example: Batch,
    *,
    lowering: Mapping[type, Callable[..., Any]] | None = None,
    opset: int = OPSET,
    with_cache: bool = True,
) -> None:
    """Write `model` as folder/model.onnx; a float model is written as it is.

    Batch size and the lengths of token sequences stay free wherever the model itself leaves them free. A
    language model that generates with a cache becomes one step of that, see `onnx_cache`. The file's metadata
    names the outputs, the input and output value of every quantized module, and under which module's path a
    tied weight is stored.

    Args:
        model: converted, or float. Its mode is set to eval for the tracing, and put back.
        folder: exists.
        example: one batch, to trace with; its first two samples are enough.
        lowering: the nodes of each type of converted module; onnxruntime's by default.
        opset: of the operators.
        with_cache: False writes a language model for whole sequences only.

    Raises:
        ValueError: the model returns something other than tensors, is not in float32, or cannot be traced.
        ImportError: the extra is not installed.
    """
    try:
        import onnx
        import onnx_ir as ir

        from recoup.export import onnx_conv, onnx_graph, onnx_integers, onnx_nodes
    except ImportError as error:
        raise ImportError(f"the onnx target needs {error.name}: pip install 'recoup[onnx]'") from None

    low = [n for n, p in model.named_parameters() if p.is_floating_point() and p.dtype != torch.float32]
    if low:
        raise ValueError(f"onnx: {low[0]} is not float32; call model.float() before recoup.prepare")
    values = example.values() if isinstance(example, Mapping) else positional(example)
    if not all(isinstance(value, Tensor) for value in values):
        raise ValueError(
            "onnx: the example holds values that are no tensors; a file has only tensors as inputs"
        )
    example = first_two(example)
    decodes = with_cache and onnx_cache.decodes(model, example)
    form = onnx_cache.traced(model, example) if decodes else traced(model, example, "onnx")
    with _closed(model) as coded:
        program = _trace(model, form, opset)
    for_onnxruntime = lowering is None
    if lowering is None:
        lowering = {
            CodedLinear: onnx_nodes.linear,
            CodedConv: onnx_conv.conv,
            CodedEmbedding: onnx_nodes.embedding,
            FakeQuantizer: onnx_nodes.output,
        }
    graph, values, owners = program.model.graph, dict[str, dict[str, str]](), _owners(coded)
    for node in [node for node in graph if node.op_type == _CLOSED]:
        path = node.attributes["path"].as_string()
        shared = list(owners.values()).count(owners[path]) > 1
        named = path.removesuffix(f".{OUTPUT}")
        nodes = onnx_graph.Graph(named, graph.initializers, owners[path], tied=shared)
        closed_input, closed_output = node.inputs[0], node.outputs[0]
        assert closed_input is not None
        lower: Any = next(nodes_of for kind, nodes_of in lowering.items() if isinstance(coded[path], kind))
        output = lower(nodes, coded[path], closed_input)
        output.dtype, output.shape = closed_output.dtype, closed_output.shape
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], list(nodes.tape.nodes), [closed_output], [output]
        )
        for initializer in nodes.tape.initializers:
            graph.register_initializer(initializer)
        call_of_path = path if path not in values else f"{path}{AGAIN}{len(values)}"
        values[call_of_path] = {INPUT: str(closed_input.name), RESULT: str(output.name)}
    if for_onnxruntime:
        onnx_integers.compute_in_integers(program.model, coded, values)
    if any(node.domain == onnx_graph.MICROSOFT for node in graph):
        program.model.opset_imports[onnx_graph.MICROSOFT] = 1
    program.model.opset_imports.pop("recoup", None)
    program.model.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    program.model.metadata_props[OUTPUTS] = json.dumps(form.outputs)
    program.model.metadata_props[MODULES] = json.dumps(values)
    if tied := {path: owner for path, owner in owners.items() if path != owner}:
        program.model.metadata_props[TIED] = json.dumps(tied)
    size = sum(
        value.const_value.nbytes for value in graph.initializers.values() if value.const_value is not None
    )
    ir.save(
        program.model, folder / FILE, external_data=f"{FILE}.data" if size > _LARGEST_SINGLE_FILE else None
    )


def _owners(coded: Mapping[str, nn.Module]) -> dict[str, str]:
    """Under which module's path the file has each weight: a tied embedding and linear layer have it once."""
    sharing = dict[Any, list[str]]()
    for path, module in coded.items():
        sharing.setdefault(getattr(module, "weight", module), []).append(path)
    return {
        path: paths[0] if any(isinstance(coded[each], CodedEmbedding) for each in paths) else path
        for paths in sharing.values()
        for path in paths
    }


def _trace(model: nn.Module, form: Traced, opset: int) -> Any:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # it reports every operator of torchvision that is not installed
    try:
        # torch prints whole graphs where it fails, beside the error
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")  # torch's own, about its own deprecated calls
            program = torch.onnx.export(
                form.module,
                form.args,
                kwargs=dict(form.kwargs),
                dynamo=True,
                dynamic_shapes=form.free,
                opset_version=opset,
                input_names=form.inputs,
                output_names=[name or "output" for name in form.outputs],
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ValueError(f"onnx: {untraceable(model, error)}") from error
    finally:
        log.setLevel(level)
        for module, mode in modes.items():
            module.training = mode
    assert program is not None
    graph = program.model.graph
    for value in list(graph.initializers.values()):
        value.name = str(value.name).removeprefix(form.prefix)
    outside = {value.name for value in (*graph.inputs, *graph.outputs)}
    for value in [value for node in graph.all_nodes() for value in node.outputs]:
        if value.name in outside and not value.is_graph_output():  # an output got the name of an operation
            value.name = f"inside.{value.name}"
    for node in graph.all_nodes():  # where in whose files it was traced: kilobytes for every node
        scopes = node.metadata_props.get(SCOPES)
        node.metadata_props.clear()
        if scopes is not None:  # the modules around it, by which advice names them
            node.metadata_props[SCOPES] = scopes
        node.doc_string = None
    return program


class _Closed(nn.Module):
    """One node of the traced graph; the lowering opens it."""

    def __init__(self, path: str, module: CodedModule | FakeQuantizer) -> None:
        super().__init__()
        self.path = path
        self.dtype = torch.float32 if isinstance(module, FakeQuantizer) else module.weight.dtype
        self.shape = _output_shape(module)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (callers may name it, as they do for nn.Linear)
        return torch.onnx.ops.symbolic(
            f"recoup::{_CLOSED}",
            (input,),
            {"path": self.path},
            dtype=self.dtype,
            shape=self.shape(input.shape),
        )


def _output_shape(module: CodedModule | FakeQuantizer) -> Callable[[Sequence[int]], list[int]]:
    """From a module's input shape to that of its output; without the module, which tracing would find."""
    if isinstance(module, FakeQuantizer):
        return list
    if isinstance(module, CodedEmbedding):
        width = module.embedding_dim
        return lambda shape: [*shape, width]
    if isinstance(module, CodedLinear):
        features = module.out_features
        return lambda shape: [*shape[:-1], features]
    assert isinstance(module, CodedConv)
    return _convolved(module)


def _convolved(module: CodedConv) -> Callable[[Sequence[int]], list[int]]:
    """The same of a convolution; each axis as in the documentation of torch's."""
    channels, sizes = module.out_channels, module.kernel_size
    spans = [(size - 1) * dilation for size, dilation in zip(sizes, module.dilation, strict=True)]
    padding = [before + after for before, after in zip(module.edges[0::2], module.edges[1::2], strict=True)]
    extra = module.output_padding if isinstance(module, CodedConvTranspose) else None
    along = list(zip(padding[::-1], spans, module.stride, extra or sizes, strict=True))

    def shape_of(shape: Sequence[int]) -> list[int]:
        lengths = zip(shape[-len(sizes) :], along, strict=True)
        if extra is not None:
            axes = [(n - 1) * by - pad + span + more + 1 for n, (pad, span, by, more) in lengths]
        else:
            axes = [(n + pad - span - 1) // by + 1 for n, (pad, span, by, _) in lengths]
        return [*shape[: -len(sizes) - 1], channels, *axes]

    return shape_of


@contextmanager
def _closed(model: nn.Module) -> Generator[dict[str, nn.Module]]:
    """Coded modules and outputs' quantizers by path, closed meanwhile; one at several paths by its first."""
    places: dict[str, Any] = {
        place: module
        for place, module in model.named_modules(remove_duplicate=False)
        if _closes(place, module)
    }
    coded: dict[str, Any] = {name: module for name, module in model.named_modules() if _closes(name, module)}
    closed = {module: _Closed(name, module) for name, module in coded.items()}
    for place, module in reversed(places.items()):  # what is inside before what is around it
        model.set_submodule(place, closed[module])
        inside = output_quantizer_of(module)
        if inside is not None and output_quantizer_of(closed[module]) is None:
            quantize_output(closed[module], inside)
    try:
        yield coded
    finally:
        for place, module in places.items():
            model.set_submodule(place, module)


def _closes(path: str, module: nn.Module) -> bool:
    return is_coded(module) or (isinstance(module, FakeQuantizer) and path.endswith(f".{OUTPUT}"))
