"""What GPTQModel writes.

    pip install torch==2.13.0 && pip install gptqmodel==7.6.0
    GPTQMODEL_CPU_WORKERS=2 python -m tests.export.peers.gptqmodel

Beside each folder lie the weights that GPTQModel's own torch kernel dequantizes.
"""

import shutil
import tempfile

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization import FORMAT

from .float_model import FLOAT, HERE, WORDS, record, tokenizer

SETTINGS = {
    "gptq-v1": {"bits": 4, "group_size": 32, "sym": True, "desc_act": True, "format": FORMAT.GPTQ},
    "gptq-v2-w8": {"bits": 8, "group_size": 32, "sym": False, "desc_act": False, "format": FORMAT.GPTQ_V2},
    "gptq-v2-w3": {"bits": 3, "group_size": 32, "sym": False, "desc_act": False, "format": FORMAT.GPTQ_V2},
}


def write(name: str) -> None:
    folder = HERE / f"gptqmodel-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    samples = torch.randint(3, WORDS, (16, 32)).tolist()
    data = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in samples]
    with tempfile.TemporaryDirectory() as temporary:
        shutil.copytree(FLOAT, temporary, dirs_exist_ok=True)
        tokenizer().save_pretrained(temporary)
        model = GPTQModel.load(
            temporary, QuantizeConfig(device="cpu", offload_to_disk=False, **SETTINGS[name])
        )
        model.quantize(data, batch_size=1)
        model.save(str(folder))
    loaded = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.TORCH)
    layers = {path: m for path, m in loaded.model.named_modules() if hasattr(m, "dequantize_weight")}
    record({path: layer.dequantize_weight().T for path, layer in layers.items()}, folder)
    for file in folder.glob("*token*"):
        file.unlink()


if __name__ == "__main__":
    for name in SETTINGS:
        write(name)
