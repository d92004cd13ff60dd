"""Where models ship: what each target checks, writes, proves and runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from recoup.engines import llama_cpp, onnx_standard, onnxruntime, pytorch, transformers
from recoup.export.fused import share_global_scales
from recoup.export.parity import Array, Parity
from recoup.export.trained import Layer, Stored, Trained
from recoup.nn import Batch, CodedExperts
from recoup.numerics import QuantSpec
from recoup.schemes import Scheme
from recoup.validate import Cost
from recoup.validate.cost import compare_costs, compare_sizes

Quantized = Mapping[str, tuple[Scheme, type]]


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a target can do. Its functions import their libraries themselves: an unused target costs nothing.

    Args:
        extra: of recoup, that brings its packages.
        packages: that it imports.
        check: (float or converted model, {module: (scheme, type of the converted module)}); raises ValueError
            for what the engine cannot run.
        kernel: (scheme, type of the converted module) -> what computes it, or how it is stored.
        width: (scheme, type of the converted module) -> bits that a code of its weight takes in the file.
        output: (module, spec of its quantized output); raises ValueError for what the files cannot hold.
        split: (float model, what is quantized, devices); raises ValueError where the engine cannot run the
            parts of every matrix on a device each.
        serve: (float model, what is quantized, reader, its GPU or None, devices) -> the kernel of every
            module on that GPU; raises ValueError where that reader does not compute what was trained.
        cache: spec of keys and values; raises ValueError where the artefact cannot hold it.
        settle: calibrated model -> the same, in place, with its scales as the engine needs them beyond what
            a module knows; whoever calibrates calls it before measuring.
        write: (converted or float model, folder, example); the files of the tokenizer or image processor are
            in the folder already, if there are any.
        trained: (converted model, folder, example) -> what the folder has to agree with.
        stored: (folder, {module: layer}) -> codes and scales of every module from the bytes alone; raises
            ParityError for other modules.
        stored_cached: folder -> scales of keys and values from the bytes alone, by name.
        compare: (what was trained, folder); the proof. Raises ParityError.
        load: folder -> a module that is called like the model and runs in the engine.
        timed: its engine here says something about speed.
        several: the types of converted modules with several weights that its files hold.
        costs: ((float folder, folder), batch) -> what both cost, measured next to each other in the engine.
    """

    extra: str
    packages: tuple[str, ...]
    check: Callable[[nn.Module, Quantized], None]
    kernel: Callable[[Scheme, type], str]
    width: Callable[[Scheme, type], int]
    output: Callable[[str, QuantSpec], None]
    split: Callable[[nn.Module, Quantized, int], None]
    serve: Callable[[nn.Module, Quantized, str, str | None, int], dict[str, str]]
    cache: Callable[[QuantSpec], None]
    settle: Callable[[nn.Module], nn.Module]
    write: Callable[[nn.Module, Path, Batch], None]
    trained: Callable[[nn.Module, Path, Batch], Trained]
    stored: Callable[[Path, Mapping[str, Layer]], dict[str, Stored]]
    stored_cached: Callable[[Path], Mapping[str, Array]]
    compare: Callable[[Trained, Path], Parity]
    load: Callable[[Path], nn.Module]
    timed: bool
    several: tuple[type, ...] = ()
    costs: Callable[[tuple[Path, Path], Batch], tuple[Cost, Cost]]

    def verify(self, model: nn.Module, folder: Path, example: Batch) -> Parity:
        """Is a folder what this converted model was?

        Raises:
            ParityError: it is not; names a tensor or a module.
        """
        return self.compare(self.trained(model, folder, example), folder)


def _of(module: str, function: str) -> Callable[..., Any]:
    """A function of this room whose module is imported when it is called: only then its library is needed."""

    def late(*given: Any) -> Any:
        return getattr(import_module(f"recoup.export.{module}"), function)(*given)

    return late


def _as_it_is(model: nn.Module) -> nn.Module:
    return model


def _no_output(path: str, spec: QuantSpec) -> None:
    raise ValueError(
        f"outputs: {path} is to have a quantized output ({spec}), which files for this target do not hold; "
        "leave it out, or export to onnx or onnx-qdq"
    )


def _its_bits(scheme: Scheme, kind: type) -> int:
    del kind
    return scheme.weights.format.bits


def _one_device(model: nn.Module, modules: Quantized, devices: int) -> None:
    del model, modules
    raise ValueError(
        f"export.tensor_parallel: {devices} devices asked, this target runs on one; leave it out, or "
        "export to compressed-tensors"
    )


def _one_reader(
    model: nn.Module, modules: Quantized, consumer: str, gpu: str | None, devices: int
) -> dict[str, str]:
    del model, modules, gpu, devices
    raise ValueError(
        f"export.consumer: {consumer} asked, this target has one reader; leave it out, or export to "
        "compressed-tensors"
    )


def _no_cache(spec: QuantSpec) -> None:
    raise ValueError(
        f"kv: {spec} asked, this target's artefacts hold no scales of keys and values; leave kv out, or "
        "export to compressed-tensors"
    )


def _none_cached(folder: Path) -> dict[str, Array]:
    del folder
    return {}


TARGETS: dict[str, Target] = {
    "onnx": Target(
        extra="onnx",
        packages=("onnx", "onnx_ir", "onnxscript", "onnxruntime"),
        check=_of("onnx", "check"),
        kernel=_of("onnx_nodes", "kernel"),
        width=_of("onnx_nodes", "width"),
        output=_of("onnx_nodes", "check_output"),
        split=_one_device,
        serve=_one_reader,
        cache=_no_cache,
        settle=_of("onnx_settle", "share_scales_of_integers"),
        write=_of("onnx", "write"),
        trained=_of("onnx_parity", "trained"),
        stored=_of("onnx_parity", "stored"),
        stored_cached=_none_cached,
        compare=_of("onnx_parity", "compare"),
        load=onnxruntime.OnnxModel,
        timed=True,
        costs=partial(
            compare_costs,
            load=onnxruntime.OnnxModel,
            size_bytes=onnxruntime.size_bytes,
            peak_bytes=onnxruntime.peak_bytes,
        ),
    ),
    "onnx-qdq": Target(
        extra="onnx-qdq",
        packages=("onnx", "onnx_ir", "onnxscript", "onnxruntime"),
        check=_of("onnx_types", "check_all"),
        kernel=_of("onnx_qdq", "kernel"),
        width=_of("onnx_types", "width"),
        output=_of("onnx_types", "check_output"),
        split=_one_device,
        serve=_one_reader,
        cache=_no_cache,
        settle=_of("onnx_settle", "share_input_scales"),
        write=_of("onnx_qdq", "write"),
        trained=_of("onnx_parity", "trained_whole"),
        stored=_of("onnx_parity", "stored"),
        stored_cached=_none_cached,
        compare=_of("onnx_qdq_parity", "compare"),
        load=onnx_standard.StandardOnnx,
        timed=False,
        costs=partial(compare_sizes, size_bytes=onnxruntime.size_bytes, unmeasured=onnx_standard.UNMEASURED),
    ),
    "compressed-tensors": Target(
        extra="compressed-tensors",
        packages=("compressed_tensors", "transformers"),
        check=_of("compressed_tensors", "check"),
        kernel=_of("compressed_tensors_config", "kernel"),
        width=_its_bits,
        output=_no_output,
        split=_of("tensor_parallel", "check_split"),
        serve=_of("compressed_tensors_consumers", "check_consumer"),
        cache=_of("compressed_tensors_config", "check_cache"),
        settle=share_global_scales,
        write=_of("compressed_tensors", "write"),
        trained=_of("compressed_tensors_parity", "trained"),
        stored=_of("compressed_tensors_parity", "stored"),
        stored_cached=_of("compressed_tensors_parity", "stored_cached"),
        compare=_of("compressed_tensors_parity", "compare"),
        load=transformers.load,
        timed=False,
        several=(CodedExperts,),
        costs=partial(compare_sizes, size_bytes=transformers.size_bytes, unmeasured=transformers.UNMEASURED),
    ),
    "pytorch": Target(
        extra="",
        packages=(),
        check=_of("pytorch", "check"),
        kernel=_of("pytorch_modules", "kernel"),
        width=_of("pytorch_modules", "width"),
        output=_no_output,
        split=_one_device,
        serve=_one_reader,
        cache=_no_cache,
        settle=_as_it_is,
        write=_of("pytorch", "write"),
        trained=_of("pytorch_parity", "trained"),
        stored=_of("pytorch_parity", "stored"),
        stored_cached=_none_cached,
        compare=_of("pytorch_parity", "compare"),
        load=pytorch.PytorchModel,
        timed=True,
        costs=partial(
            compare_costs,
            load=pytorch.PytorchModel,
            size_bytes=pytorch.size_bytes,
            peak_bytes=pytorch.peak_bytes,
        ),
    ),
    "gguf": Target(
        extra="gguf",
        packages=("gguf", "xllamacpp", "transformers"),
        check=_of("gguf", "check"),
        kernel=_of("gguf_blocks", "kernel"),
        width=_its_bits,
        output=_no_output,
        split=_one_device,
        serve=_one_reader,
        cache=_no_cache,
        settle=_as_it_is,
        write=_of("gguf", "write"),
        trained=_of("gguf_parity", "trained"),
        stored=_of("gguf_parity", "stored"),
        stored_cached=_none_cached,
        compare=_of("gguf_parity", "compare"),
        load=llama_cpp.LlamaCpp,
        timed=True,
        costs=partial(
            compare_costs,
            load=llama_cpp.Prompts,
            size_bytes=llama_cpp.size_bytes,
            peak_bytes=llama_cpp.peak_bytes,
        ),
    ),
}


def target_named(name: str) -> Target:
    """The target of that name.

    Raises:
        ValueError: there is none; names the nearest.
    """
    if name not in TARGETS:
        nearest = get_close_matches(name, TARGETS, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"this version writes {', '.join(TARGETS)}"
        raise ValueError(f"no export target {name!r}; {hint}")
    return TARGETS[name]


def usable(name: str) -> Target:
    """The target of that name, whose packages are installed; imports none of them.

    Raises:
        ValueError: there is none; names the nearest.
        ImportError: one is not installed; names the extra that brings it.
    """
    target = target_named(name)
    for package in target.packages:
        if find_spec(package) is None:
            raise ImportError(
                f"the {name} target needs {package}: pip install 'recoup[{target.extra}]'", name=package
            )
    return target
