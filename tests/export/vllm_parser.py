"""Asks vLLM what it makes of every folder that recoup writes; run by hand, from the root of the repository:

    python -m tests.export.vllm_parser VENV

makes a virtual environment in VENV, which has vLLM and the compressed-tensors that it pins, and sees the
packages of this one behind them (torch among them); writes a folder of every scheme of `llamas.SCHEMES`; and
has vLLM parse config.json, choose a scheme for every layer, and make place for its tensors, on a pretended
GPU of each capability in `GPUS`. No kernel is chosen and none runs: it shows which class of vLLM takes a
layer, and that the tensors which that wants are those in the file, by name and shape.

What it prints stands in docs/export.md.
"""

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from safetensors.torch import load_file

PINNED = ("vllm==0.33.0", "compressed-tensors==0.17.0")
# What vLLM imports on the way to its parser, and this environment lacks or has in another version.
IMPORTED = (
    *("transformers>=5.16.1,<5.21", "aiohttp", "blake3", "cachetools", "cbor2", "cloudpickle", "fastapi"),
    *("llguidance", "msgspec", "openai", "openai-harmony", "partial-json-parser", "prometheus-client"),
    *("py-cpuinfo", "pybase64", "pyzmq", "sentencepiece", "setproctitle", "uvloop", "xgrammar"),
)
GPUS = {"Ampere": (8, 0), "Hopper": (9, 0), "Blackwell": (10, 0)}
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
# Layers as vLLM has them, and what the config calls the number of their inputs.
LAYERS = {
    **{f"self_attn.{name}_proj": "hidden_size" for name in ("qkv", "o")},
    "mlp.gate_up_proj": "hidden_size",
    "mlp.down_proj": "intermediate_size",
}
ONE_PROCESS = {"get_tensor_model_parallel_rank": 0, "get_tensor_model_parallel_world_size": 1}


def main(where: Path) -> None:
    """Make the environment, write the folders, ask."""
    from .llamas import SCHEMES, written

    python = where / "bin" / "python"
    if not python.exists():
        venv.create(where, with_pip=True)
        (site,) = where.glob("lib/python*/site-packages")
        ours = next(path for path in sys.path if path.endswith("site-packages"))
        (site / "behind.pth").write_text(f"{ours}\n")
        for packages in (("--no-deps", *PINNED), IMPORTED):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    with tempfile.TemporaryDirectory() as folders:
        for name, scheme in SCHEMES.items():
            written(scheme, Path(folders) / name)
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
    from vllm.platforms.interface import DeviceCapability

    _pretend()
    rows: dict[str, list[str]] = {}
    for capability in GPUS.values():
        kind: Any = type(current_platform)
        kind.is_cuda = lambda _: True
        kind.get_device_capability = lambda *_, c=capability, **__: DeviceCapability(*c)
        for folder in sorted(folders.iterdir()):
            rows.setdefault(folder.name, []).append(_answer(CompressedTensorsConfig, folder))
    lines = [
        f"vLLM {vllm.__version__}, compressed-tensors {compressed_tensors.__version__}",
        f"| scheme | {' | '.join(GPUS)} |",
        "|---|" + "---|" * len(GPUS),
        *(f"| `{name}` | {' | '.join(found)} |" for name, found in rows.items()),
    ]
    answers.write_text("\n".join(lines) + "\n")


def _pretend() -> None:
    """One process, and some kernel: those cannot be asked without a GPU."""
    for name, module in list(sys.modules.items()):
        if not name.startswith("vllm."):
            continue
        for function in ONE_PROCESS.keys() & vars(module).keys():
            setattr(module, function, lambda size=ONE_PROCESS[function]: size)
        for function in list(vars(module)) if ".compressed_tensors.schemes" in name else ():
            if function.startswith(("init_", "choose_", "get_current_vllm_config")):
                setattr(module, function, MagicMock(return_value=MagicMock(__name__="some kernel")))


def _answer(parser: Any, folder: Path) -> str:
    """The class that takes the layers of a folder, or why none does."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    parsed = parser.from_config(config["quantization_config"])
    parsed.packed_modules_mapping = FUSED
    found: set[str] = set()
    for layer, columns in LAYERS.items():
        path = f"model.layers.0.{layer}"
        try:
            scheme = parsed.get_scheme(_layer(), path)
        except (ValueError, NotImplementedError) as error:
            found.add(f"refused: {str(error).split(' for layer_name')[0]}")
            continue
        found.add(type(scheme).__name__.removeprefix("CompressedTensors"))
        found |= _differences(scheme, path, config[columns], tensors)
    return ", ".join(sorted(found))


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
    main(Path(sys.argv[1])) if len(sys.argv) == 2 else ask(*map(Path, sys.argv[1:]))
