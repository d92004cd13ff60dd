"""The verb: convert, write, read back, and only then put the folder where it was asked for."""

import copy
import json
import shutil
import tempfile
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from recoup.convert import convert
from recoup.export import record
from recoup.export.fields import filled, too_wide
from recoup.export.parity import Parity
from recoup.export.targets import usable
from recoup.nn import (
    CODED_MODULES,
    Batch,
    CodedExperts,
    CodedGRU,
    CodedLSTM,
    CodedMultiheadAttention,
    CodedOwnForward,
    cache_quantizers,
    cut,
    is_coded,
    is_prepared,
    moved,
    output_quantizers,
    quant_type,
    refuse_peft,
    size_of,
)
from recoup.schemes import Plan, Scheme

PARITY_FILE = "parity.json"
_RECORDED_BYTES = 2**22  # of the batch
_PROCESSOR_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.bpe.model",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*preprocessor_config.json",
)


def preflight(
    model: nn.Module,
    plan: Plan,
    target: str,
    *,
    tensor_parallel: int = 1,
    consumer: str | None = None,
    gpu: str | None = None,
) -> dict[str, str]:
    """Can the target's engine run this plan? Asked before any calibration or training.

    Args:
        model: float, as `resolve` saw it.
        plan: from `resolve`.
        target: a key of `TARGETS`.
        tensor_parallel: devices over which the engine will split every matrix.
        consumer: who will read the artefact, as "vllm" or "vllm>=0.27"; None asks for no more than the
            engine that proves it.
        gpu: the generation of GPU on which the consumer will run, as "hopper"; None asks for no more than
            what it does on every GPU.

    Returns:
        What computes every quantized module there, or how it is stored, by name; the kernel on the GPU, too,
        where one is named. Where codes lie in fields
        wider than they need, that says so, and a warning says what it costs, unless their kernel is for them.

    Raises:
        ValueError: no such target, or a model or a module whose scheme the engine, or the consumer, cannot
            run, or not on so many devices; names them.
        ImportError: the target's libraries are not installed; names the extra.
    """
    modules: dict[str, tuple[Scheme, type]] = {}
    for path in plan.modules:
        prepared = quant_type(model.get_submodule(path))
        assert prepared is not None
        modules[path] = (plan[path], CODED_MODULES[prepared])  # pyright: ignore[reportArgumentType]
    there = usable(target)
    _written_weights(modules, target)
    there.check(model, modules)
    for path, spec in plan.outputs.items():
        there.output(path, spec)
    if plan.kv is not None:
        there.cache(plan.kv)
    if tensor_parallel > 1:
        there.split(model, modules, tensor_parallel)
    if gpu is not None and consumer is None:
        raise ValueError(f"export.gpu: {gpu} asked without a reader; name one, as consumer: vllm")
    served: dict[str, str] = {}
    if consumer is not None:
        served = there.serve(model, modules, consumer, gpu, tensor_parallel)
    widths = {path: (scheme, there.width(scheme, kind)) for path, (scheme, kind) in modules.items()}
    # where the narrow codes have a kernel that wide ones have not, the fields are what that costs
    idle = {
        path: (scheme, width)
        for path, (scheme, width) in widths.items()
        if there.kernel(scheme, modules[path][1]) == there.kernel(filled(scheme, width), modules[path][1])
    }
    for line in too_wide(model, idle):
        warnings.warn(f"{target}: {line}", stacklevel=2)
    fields = {
        path: f", in fields of {width} bits" if width > scheme.weights.format.bits else ""
        for path, (scheme, width) in widths.items()
    }
    return {
        path: there.kernel(scheme, kind) + fields[path] + (f", {served[path]}" if path in served else "")
        for path, (scheme, kind) in modules.items()
    }


def export(
    model: nn.Module,
    folder: str | Path,
    target: str,
    *,
    processor: Any = None,
    example: Batch | None = None,
) -> Parity:
    """Write a prepared (or converted) model for an engine, and prove that it is what was trained.

    The artefact is written beside `folder`, read back from its bytes, run in the engine and compared;
    then it gets its name. Never changes the model: a prepared one can be trained on afterwards.

    Args:
        model: prepared and calibrated, or converted.
        folder: must not exist, or be empty.
        target: "onnx", a file for onnxruntime; "onnx-qdq", one of ONNX's own operators, as for TensorRT;
            "compressed-tensors", a folder for transformers and vLLM; "pytorch", a program of torch.export;
            or "gguf", a file for llama.cpp.
        processor: a tokenizer or image processor to `save_pretrained` into the folder; by default copied
            from the model's own folder where it has one.
        example: one batch, to trace and compare with, cut to the samples that fit into 4 MiB; by default the
            first that `calibrate` saw, or the `dummy_inputs` of a transformers model.

    Returns:
        What was compared, and how close it is; also in the folder, as parity.json. What `verify` compares
        it with later is in artefact.json and artefact.tensors.

    Raises:
        ValueError: no such target, the folder is not empty, no example, layers of PEFT's, or a scheme that
            the engine cannot run.
        ImportError: the target's libraries are not installed; names the extra.
        OSError: the folder cannot be written, as on a disk that is full. Nothing is left behind.
        ParityError: the artefact is not what was trained. Nothing is left behind.
    """
    writer = usable(target)
    refuse_peft(model)
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not empty; choose another folder, or remove it")
    example = moved(_example(model) if example is None else example, torch.device("cpu"))
    example = cut(example, _samples(example))
    with torch.no_grad():
        coded = converted_copy(model)
    modules = {n: (m.scheme, type(m)) for n, m in coded.named_modules() if is_coded(m)}
    _written_weights(modules, target)
    writer.check(coded, modules)
    for path, quantizer in output_quantizers(coded).items():
        writer.output(path, quantizer.spec)
    for key, _ in cache_quantizers(coded).values():
        writer.cache(key.spec)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        writing(folder),
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary,
    ):
        unproven = Path(temporary) / "artefact"
        unproven.mkdir()
        complete = _add_processor(model, unproven, processor)
        writer.write(coded, unproven, example)
        trained = writer.trained(coded, unproven, example)
        parity = writer.compare(trained, unproven)
        record.write(unproven, target, trained)
        (unproven / PARITY_FILE).write_text(json.dumps(parity.to_json(), indent=2) + "\n")
        if folder.exists():
            folder.rmdir()
        unproven.rename(folder)
    if not complete:
        warnings.warn("the artefact has no tokenizer or image processor; pass processor=", stacklevel=2)
    return parity


def _written_weights(modules: Mapping[str, tuple[Scheme, type]], target: str) -> None:
    """Refuse modules with several weights that a target does not write.

    Raises:
        ValueError: a module with several weights is quantized, or one with a forward of its own.
    """
    for path, (_, kind) in modules.items():
        several = (CodedExperts, CodedLSTM, CodedGRU, CodedMultiheadAttention, CodedOwnForward)
        if kind in several and kind not in usable(target).several:
            what = kind.__name__.removeprefix("Coded")
            raise ValueError(
                f"{path}: {target} files do not hold quantized {what} yet; keep it in float with "
                f"{{match: {path}, scheme: none}}"
            )


@contextmanager
def writing(folder: Path) -> Generator[None]:
    """What cannot be written inside is one error that names the folder.

    Raises:
        OSError: instead of what Python and the libraries raise on a disk that is full.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
        raise OSError(
            f"{folder}: cannot be written ({reason}); nothing of it is left: make room, and run the same "
            "again"
        ) from error


def converted_copy(model: nn.Module) -> nn.Module:
    """A converted model that shares every float Parameter with this one, on the CPU and in eval mode."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    duplicate = copy.deepcopy(model, shared).eval()
    if not any(is_coded(module) for module in duplicate.modules()) or any(
        map(is_prepared, duplicate.modules())
    ):
        duplicate = convert(duplicate)
    if any(tensor.device.type != "cpu" for tensor in (*duplicate.parameters(), *duplicate.buffers())):
        duplicate = copy.deepcopy(duplicate).cpu()
    return duplicate


def _example(model: nn.Module) -> Batch:
    for name in ("recoup_example", "dummy_inputs"):
        example = getattr(model, name, None)
        if example is not None:
            return example
    raise ValueError(
        "export traces the model with a batch and has none; pass example=batch, or calibrate first"
    )


def _samples(example: Batch) -> int:
    """How many samples of a batch fit into a folder; two at least, to trace with."""
    values = (
        example.values()
        if isinstance(example, Mapping)
        else (example,)
        if isinstance(example, Tensor)
        else example
    )
    size = sum(value.nbytes for value in values if isinstance(value, Tensor))
    return max(2, _RECORDED_BYTES * size_of(example) // max(size, 1))


def _add_processor(model: nn.Module, folder: Path, processor: Any) -> bool:
    """What turns a user's data into the model's inputs belongs to the artefact; False if there is none."""
    if processor is not None:
        processor.save_pretrained(folder)
        return True
    config = getattr(model, "config", None)
    if config is None:
        return True  # no transformers model: it has no processor
    name = str(getattr(config, "_name_or_path", "") or "")  # empty for a model that was not loaded
    source = Path(name)
    files = (
        [file for pattern in _PROCESSOR_FILES for file in sorted(source.glob(pattern))]
        if name and source.is_dir()
        else []
    )
    for file in [*files, *source.glob("config.json")] if files else []:
        shutil.copy2(file, folder)  # what is written later replaces it, and knows more
    return bool(files)
