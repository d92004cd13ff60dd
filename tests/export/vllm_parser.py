"""Asks vLLM what it makes of every folder that recoup writes; run by hand, from the root of the repository:

    python -m tests.export.vllm_parser VENV [VERSION]

makes a virtual environment in VENV, which has that vLLM and the compressed-tensors that it pins, and sees the
packages of this one behind them (torch among them); writes a folder of every scheme of `llamas.SCHEMES`; and
has vLLM parse config.json, choose a scheme and a kernel for every layer, and make place for its tensors, on a
pretended GPU of each capability in `GPUS` that has every kernel installed. None runs: it shows which classes
of vLLM take a layer, and that the tensors which those want are the ones in the file, by name and shape.

What it prints stands in docs/export.md, and in `KERNELS` of `recoup.export.compressed_tensors_kernels`.
"""

import json
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from safetensors.torch import load_file

NEWEST = "0.33.0"
# What vLLM imports on the way to its parser, and this environment lacks or has in another version.
IMPORTED = (
    *("transformers>=5.16.1,<5.21", "aiohttp", "blake3", "cachetools", "cbor2", "cloudpickle", "fastapi"),
    *("llguidance", "msgspec", "openai", "openai-harmony", "partial-json-parser", "prometheus-client"),
    *("einops", "py-cpuinfo", "pybase64", "pyzmq", "sentencepiece", "setproctitle", "uvloop", "xgrammar"),
)
KERNELS = ("humming-kernels", "cuda-bindings", "cuda-pathfinder")  # import without a GPU
GPUS = {"Ampere": (8, 0), "Ada": (8, 9), "Hopper": (9, 0), "Blackwell": (10, 0)}
BLOCKS_SINCE = (
    9,
    0,
)  # csrc/quantization/w8a8/cutlass/scaled_mm_entry.cu, cutlass_scaled_mm_supports_block_fp8
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
RECIPES = {
    "w4a16, w8a8 and w8a16": {
        "scheme": "w4a16",
        "rules": [{"match": "*.mlp", "scheme": "w8a8"}, {"match": "*.o_proj", "scheme": "w8a16"}],
    },
    "fp8, kv fp8": {"scheme": "fp8", "kv": "fp8"},
}
# Layers as vLLM has them, and what the config calls the number of their inputs.
LAYERS = {
    **{f"self_attn.{name}_proj": "hidden_size" for name in ("qkv", "o")},
    "mlp.gate_up_proj": "hidden_size",
    "mlp.down_proj": "intermediate_size",
}
THERE = re.compile("^has_(flashinfer|humming)|^cutlass_.*supports_")
SCALES = re.compile("[.][kv]_scale$")  # of keys and values
ONE_PROCESS = {"get_tensor_model_parallel_rank": 0, "get_tensor_model_parallel_world_size": 1}


def main(where: Path, version: str = NEWEST) -> None:
    """Make the environment, write the folders, ask."""
    from recoup import Recipe

    from .llamas import SCHEMES, written

    python = where / "bin" / "python"
    if not python.exists():
        venv.create(where, with_pip=True)
        (site,) = where.glob("lib/python*/site-packages")
        ours = next(path for path in sys.path if path.endswith("site-packages"))
        (site / "behind.pth").write_text(f"{ours}\n")
        install = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, "--no-deps", f"vllm=={version}", *KERNELS], check=True)
        (metadata,) = site.glob("vllm-*.dist-info/METADATA")
        pinned = re.findall("^Requires-Dist: (compressed-tensors==.*)$", metadata.read_text(), re.MULTILINE)
        subprocess.run([*install, "--no-deps", *pinned], check=True)
        subprocess.run([*install, *IMPORTED], check=True)
    with tempfile.TemporaryDirectory() as folders:
        for name, scheme in (SCHEMES | RECIPES).items():
            written(Recipe.model_validate(scheme) if name in RECIPES else scheme, Path(folders) / name)
        answers = Path(folders) / "answers"
        subprocess.run([python, __file__, folders, answers], check=True, stdout=subprocess.DEVNULL)
        print(answers.read_text(), end="")


def ask(folders: Path, answers: Path) -> None:
    """In vLLM's environment: the table."""
    import compressed_tensors
    import vllm
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability, PlatformEnum

    _pretend()
    cells: dict[str, list[str]] = {}
    for capability in GPUS.values():
        kind: Any = type(current_platform)
        kind._enum = PlatformEnum.CUDA
        kind.is_cuda = lambda _: True
        kind.get_device_capability = lambda *_, c=capability, **__: DeviceCapability(*c)
        for module in [m for name, m in sys.modules.items() if name.startswith("vllm.")]:
            if hasattr(module, "CUTLASS_BLOCK_FP8_SUPPORTED"):
                module.CUTLASS_BLOCK_FP8_SUPPORTED = capability >= BLOCKS_SINCE
        for folder in sorted(folders.iterdir()):
            cells.setdefault(folder.name, []).append(_answer(CompressedTensorsConfig, folder))
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, found in cells.items():
        rows.setdefault(tuple(found), []).append(f"`{name}`")
    lines = [
        f"vLLM {vllm.__version__}, compressed-tensors {compressed_tensors.__version__}",
        f"| scheme | {' | '.join(GPUS)} |",
        "|---|" + "---|" * len(GPUS),
        *(f"| {', '.join(names)} | {' | '.join(found)} |" for found, names in rows.items()),
    ]
    answers.write_text("\n".join(lines) + "\n")


def _pretend() -> None:
    """One process, a config of defaults, and every kernel that the GPU could run is installed."""
    config = MagicMock()
    config.compilation_config.custom_ops = ["none"]
    for name, module in list(sys.modules.items()):
        if not name.startswith("vllm."):
            continue
        for function in list(vars(module)):
            if function in ONE_PROCESS:
                setattr(module, function, lambda *_, size=ONE_PROCESS[function]: size)
            elif function == "get_current_vllm_config":
                setattr(module, function, lambda: config)
            elif THERE.search(function):
                least = 100 if "fp4" in function else 0
                setattr(module, function, lambda gpu=100, least=least, **_: gpu >= least)


def _answer(parser: Any, folder: Path) -> str:
    """The class that takes the layers of a folder, or why none does."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    try:
        parsed = parser.from_config(config["quantization_config"])
    except ValueError as error:
        return _refused(error)
    parsed.packed_modules_mapping = FUSED
    found: set[str] = set()
    for layer, columns in LAYERS.items():
        path = f"model.layers.0.{layer}"
        try:
            scheme = parsed.get_scheme(_layer(), path)
            differences = _differences(scheme, path, config[columns], tensors)
        except (ValueError, RuntimeError) as error:
            found.add(_refused(error))
            continue
        found |= {
            f"{type(scheme).__name__.removeprefix('CompressedTensors')} {_kernel(scheme)}",
            *differences,
        }
    if parsed.kv_cache_scheme is not None:
        found.add(_cache(parsed, tensors))
    return ", ".join(sorted(found))


def _cache(parsed: Any, tensors: Any) -> str:
    """What vLLM makes of the scheme of keys and values, and of the names of their scales."""
    import torch
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors
    from vllm.model_executor.model_loader.weight_utils import maybe_remap_kv_scale_name

    layer = torch.nn.Module()
    layer.num_kv_heads = 2
    compressed_tensors.CompressedTensorsKVCacheMethod(parsed).create_weights(layer)
    places = {f"model.layers.0.self_attn.attn.{name}": place for name, place in layer.named_parameters()}
    stored = {
        maybe_remap_kv_scale_name(name, places): tensors[name] for name in tensors if SCALES.search(name)
    }
    found = [str(name).rpartition(".")[2] for name in stored if places[name].shape == stored[name].shape]
    return f"{parsed.kv_cache_scheme['type']}{parsed.kv_cache_scheme['num_bits']} cache ({', '.join(found)})"


def _refused(error: Exception) -> str:
    """With the reason, without the layer."""
    return "refused: " + " ".join(str(error).split(" for layer_name")[0].split())[:120]


def _kernel(scheme: Any) -> str:
    """The class that computes the product."""
    kernels = {type(value).__name__ for value in vars(scheme).values()}
    (kernel,) = {name for name in kernels if name.endswith("Kernel")} or {"(no kernel asked)"}
    return kernel.removesuffix("Kernel").removesuffix("Linear")


def _layer() -> Any:
    import torch

    return type("ColumnParallelLinear", (torch.nn.Module,), {})()  # vLLM goes by the name of the class


def _differences(scheme: Any, path: str, columns: int, tensors: Any) -> set[str]:
    """What vLLM makes place for in a layer and the file has not, or the reverse, or in another shape."""
    import torch

    parent, _, layer = path.rpartition(".")
    parts = [f"{parent}.{name}." for name in FUSED.get(layer, [layer])]
    rows = len(tensors[f"{parts[0]}bias"])
    wanted = _layer()
    scheme.create_weights(
        layer=wanted,
        input_size=columns,
        input_size_per_partition=columns,
        output_size=rows * len(parts),
        output_partition_sizes=[rows] * len(parts),
        params_dtype=torch.bfloat16,
        weight_loader=lambda *_: None,
    )
    places = {name: tuple(parameter.shape) for name, parameter in wanted.named_parameters()}
    found: set[str] = set()
    for name in places.keys() | {n.removeprefix(parts[0]) for n in tensors if n.startswith(parts[0])}:
        stored = [tensors[f"{part}{name}"] for part in parts if f"{part}{name}" in tensors]
        raw = [tensor.view(torch.uint8) for tensor in stored]
        one_for_all = raw and all(torch.equal(tensor, raw[0]) for tensor in raw)
        shapes = [tuple(stored[0].shape)] if one_for_all else []
        shapes += [tuple(torch.cat(stored).shape)] if stored else []
        if name != "bias" and places.get(name) not in shapes:
            found.add(f"{name}: {places.get(name)} wanted, {shapes} stored")
    return found


if __name__ == "__main__":
    ask(*map(Path, sys.argv[1:])) if __package__ is None else main(Path(sys.argv[1]), *sys.argv[2:])
