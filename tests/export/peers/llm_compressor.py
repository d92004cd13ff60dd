"""What llm-compressor writes.

    pip install torch==2.13.0 && pip install llmcompressor==0.14.0.1
    python -m tests.export.peers.llm_compressor

Beside each folder lie its weights as compressed-tensors decompresses them.
"""

import shutil

import torch
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM

from .float_model import FLOAT, HERE, record, weights_of

WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
SCHEMES = {
    "w4a16": {"group_0": {"targets": ["Linear"], "weights": QuantizationArgs(**WEIGHTS, symmetric=True)}},
    "w4a16-asym": {
        "group_0": {"targets": ["Linear"], "weights": QuantizationArgs(**WEIGHTS, symmetric=False)}
    },
    "w8a8": "W8A8",
    "fp8-dynamic": "FP8_DYNAMIC",
    "fp8-block": "FP8_BLOCK",
    "nvfp4a16": "NVFP4A16",
    "mxfp4a16": "MXFP4A16",
}


def write(name: str) -> None:
    folder = HERE / f"llm-compressor-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(FLOAT, dtype=torch.bfloat16)
    scheme = SCHEMES[name]
    given = (
        {"targets": ["Linear"], "scheme": scheme} if isinstance(scheme, str) else {"config_groups": scheme}
    )
    oneshot(model=model, recipe=QuantizationModifier(ignore=["lm_head"], **given))
    model.save_pretrained(folder, save_compressed=True)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    loaded.hf_quantizer.compressor.decompress_model(loaded)
    record(weights_of(loaded), folder)


if __name__ == "__main__":
    for name in SCHEMES:
        write(name)
