"""The verb: convert, write, read back, and only then put the folder where it was asked for."""

import copy
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recoup.convert import convert
from recoup.engines import llama_cpp, onnxruntime, transformers
from recoup.export.fused import share_global_scales
from recoup.export.parity import Parity
from recoup.nn import CODED_MODULES, Batch, is_coded, is_prepared, moved, quant_type
from recoup.schemes import Plan, Scheme
from recoup.validate import Cost
from recoup.validate.cost import compare_costs, compare_sizes

PARITY_FILE = "parity.json"
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
Quantized = Mapping[str, tuple[Scheme, type]]


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a target can do. Its functions import their libraries themselves: an unused target costs nothing.

    Args:
        check: (float or converted model, {module: (scheme, type of the converted module)}); raises ValueError
            for what the engine cannot run.
        settle: calibrated model -> the same, in place, with its scales as the engine needs them beyond what
            a module knows; whoever calibrates calls it before measuring.
        write: (converted or float model, folder, example); the files of the tokenizer or image processor are
            in the folder already, if there are any.
        verify: (converted model, folder, example); raises ParityError.
        load: folder -> a module that is called like the model and runs in the engine.
        costs: ((float folder, folder), batch) -> what both cost, measured next to each other in the engine.
    """

    check: Callable[[nn.Module, Quantized], None]
    settle: Callable[[nn.Module], nn.Module]
    write: Callable[[nn.Module, Path, Batch], None]
    verify: Callable[[nn.Module, Path, Batch], Parity]
    load: Callable[[Path], nn.Module]
    costs: Callable[[tuple[Path, Path], Batch], tuple[Cost, Cost]]


def _onnx_check(model: nn.Module, modules: Quantized) -> None:
    from recoup.export import onnx_nodes

    del model
    for path, (scheme, kind) in modules.items():
        onnx_nodes.check(path, scheme, kind)


def _onnx_write(model: nn.Module, folder: Path, example: Batch) -> None:
    from recoup.export import onnx

    onnx.write(model, folder, example)


def _onnx_verify(model: nn.Module, folder: Path, example: Batch) -> Parity:
    from recoup.export import onnx_parity

    return onnx_parity.verify(model, folder, example)


def _onnx_costs(folders: tuple[Path, Path], batch: Batch) -> tuple[Cost, Cost]:
    return compare_costs(
        folders, batch,
        load=onnxruntime.OnnxModel, size_bytes=onnxruntime.size_bytes, peak_bytes=onnxruntime.peak_bytes,
    )  # fmt: skip


def _folder_check(model: nn.Module, modules: Quantized) -> None:
    from recoup.export import compressed_tensors

    compressed_tensors.check(model, modules)


def _folder_write(model: nn.Module, folder: Path, example: Batch) -> None:
    from recoup.export import compressed_tensors

    compressed_tensors.write(model, folder, example)


def _folder_verify(model: nn.Module, folder: Path, example: Batch) -> Parity:
    from recoup.export import compressed_tensors_parity

    return compressed_tensors_parity.verify(model, folder, example)


def _folder_costs(folders: tuple[Path, Path], batch: Batch) -> tuple[Cost, Cost]:
    return compare_sizes(
        folders, batch, size_bytes=transformers.size_bytes, unmeasured=transformers.UNMEASURED
    )


def _gguf_check(model: nn.Module, modules: Quantized) -> None:
    from recoup.export import gguf

    gguf.check(model, modules)


def _gguf_write(model: nn.Module, folder: Path, example: Batch) -> None:
    from recoup.export import gguf

    gguf.write(model, folder, example)


def _gguf_verify(model: nn.Module, folder: Path, example: Batch) -> Parity:
    from recoup.export import gguf_parity

    return gguf_parity.verify(model, folder, example)


def _gguf_costs(folders: tuple[Path, Path], batch: Batch) -> tuple[Cost, Cost]:
    return compare_costs(
        folders, batch,
        load=llama_cpp.Prompts, size_bytes=llama_cpp.size_bytes, peak_bytes=llama_cpp.peak_bytes,
    )  # fmt: skip


TARGETS: dict[str, Target] = {
    "onnx": Target(
        check=_onnx_check,
        settle=lambda model: model,
        write=_onnx_write,
        verify=_onnx_verify,
        load=onnxruntime.OnnxModel,
        costs=_onnx_costs,
    ),
    "compressed-tensors": Target(
        check=_folder_check,
        settle=share_global_scales,
        write=_folder_write,
        verify=_folder_verify,
        load=transformers.load,
        costs=_folder_costs,
    ),
    "gguf": Target(
        check=_gguf_check,
        settle=lambda model: model,
        write=_gguf_write,
        verify=_gguf_verify,
        load=llama_cpp.LlamaCpp,
        costs=_gguf_costs,
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


def preflight(model: nn.Module, plan: Plan, target: str) -> None:
    """Can the target's engine run this plan? Asked before any calibration or training.

    Args:
        model: float, as `resolve` saw it.
        plan: from `resolve`.
        target: a key of `TARGETS`.

    Raises:
        ValueError: no such target, or a model or a module whose scheme the engine cannot run; names them.
        ImportError: the target's libraries are not installed; names the extra.
    """
    modules: dict[str, tuple[Scheme, type]] = {}
    for path in plan.modules:
        prepared = quant_type(model.get_submodule(path))
        assert prepared is not None
        modules[path] = (plan[path], CODED_MODULES[prepared])  # pyright: ignore[reportArgumentType]
    _check(model, modules, target)


def _check(model: nn.Module, modules: Quantized, target: str) -> None:
    try:
        target_named(target).check(model, modules)
    except ImportError as error:
        raise ImportError(f"the {target} target needs {error.name}: pip install 'recoup[{target}]'") from None


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
        target: "onnx", a file for onnxruntime; "compressed-tensors", a folder for transformers and vLLM; or
            "gguf", a file for llama.cpp.
        processor: a tokenizer or image processor to `save_pretrained` into the folder; by default copied
            from the model's own folder where it has one.
        example: one batch, to trace and compare with; by default the first that `calibrate` saw, or the
            `dummy_inputs` of a transformers model.

    Returns:
        What was compared, and how close it is; also in the folder, as parity.json.

    Raises:
        ValueError: no such target, the folder is not empty, no example, or the engine cannot run a scheme.
        ParityError: the artefact is not what was trained. Nothing is left behind.
    """
    writer = target_named(target)
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not empty; choose another folder, or remove it")
    example = moved(_example(model) if example is None else example, torch.device("cpu"))
    with torch.no_grad():
        coded = _converted_copy(model)
    _check(coded, {n: (m.scheme, type(m)) for n, m in coded.named_modules() if is_coded(m)}, target)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        unproven = Path(temporary) / "artefact"
        unproven.mkdir()
        complete = _add_processor(model, unproven, processor)
        writer.write(coded, unproven, example)
        parity = writer.verify(coded, unproven, example)
        (unproven / PARITY_FILE).write_text(json.dumps(parity.to_json(), indent=2) + "\n")
        if folder.exists():
            folder.rmdir()
        unproven.rename(folder)
    if not complete:
        warnings.warn("the artefact has no tokenizer or image processor; pass processor=", stacklevel=2)
    return parity


def _converted_copy(model: nn.Module) -> nn.Module:
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
