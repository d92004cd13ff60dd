"""What NVIDIA's ModelOpt writes.

    pip install torch==2.13.0 && pip install "nvidia-modelopt[hf]==0.47.0"
    python -m tests.export.peers.modelopt

Beside each folder lie the weights that ModelOpt itself multiplies by. In float32, because in bfloat16 its
fake quantization rounds to other codes than its export writes here and there; at ties integers do even so.
"""

import copy
import shutil

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from .float_model import FLOAT, HERE, WORDS, record

_INT4 = copy.deepcopy(mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)
for entry in _INT4["quant_cfg"]:
    if "block_sizes" in (entry.get("cfg") or {}):
        entry["cfg"]["block_sizes"][-1] = 32
CONFIGS = {"fp8": mtq.FP8_DEFAULT_CFG, "nvfp4": mtq.NVFP4_DEFAULT_CFG, "w4a16": _INT4}


def write(name: str) -> None:
    folder = HERE / f"modelopt-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(FLOAT, dtype=torch.float32)
    ids = torch.randint(3, WORDS, (4, 16))
    mtq.quantize(model, CONFIGS[name], forward_loop=lambda model: model(ids))
    quantized = {path: m for path, m in model.named_modules() if hasattr(m, "weight_quantizer")}
    if name != "nvfp4":
        record({path: module.weight_quantizer(module.weight) for path, module in quantized.items()}, folder)
    export_hf_checkpoint(model, export_dir=folder)
    if name == "nvfp4":
        record(_unpacked(load_file(folder / "model.safetensors")), folder)


def _unpacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By ModelOpt's own tensor class: its fake quantization to NVFP4 runs on CUDA only."""
    found = {}
    for name, scale in tensors.items():
        if name.endswith(".weight_scale"):
            path = name.removesuffix(".weight_scale")
            packed = tensors[f"{path}.weight"]
            shape = torch.Size((packed.shape[0], 2 * packed.shape[1]))
            double = tensors[f"{path}.weight_scale_2"]
            held = NVFP4QTensor(shape, torch.float32, packed)
            found[path] = held.dequantize(scale=scale, double_scale=double, block_sizes={-1: 16})
    return found


if __name__ == "__main__":
    for name in CONFIGS:
        write(name)
