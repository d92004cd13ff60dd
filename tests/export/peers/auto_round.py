"""What AutoRound writes.

    pip install torch==2.13.0 && pip install auto-round==0.15.1
    python -m tests.export.peers.auto_round

Nothing is tuned (`iters=0`), so no data is needed. Beside each folder lie the weights that AutoRound itself
held when it wrote it. Not here: asymmetric weights in its own format, whose packing fails in this version
(`WQLinear_GEMM` takes no `weight_dtype`).
"""

import shutil

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM

from .float_model import FLOAT, HERE, record, tokenizer, weights_of

SCHEMES = {  # format, and the settings of the scheme
    "w4": ("auto_round", {"bits": 4, "group_size": 32, "sym": True}),
    "w2": ("auto_round", {"bits": 2, "group_size": 32, "sym": True}),
    "auto-gptq": ("auto_gptq", {"bits": 4, "group_size": 32, "sym": False}),
    "auto-awq": ("auto_awq", {"bits": 4, "group_size": 32, "sym": False}),
}


def write(name: str) -> None:
    folder = HERE / f"auto-round-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(FLOAT, dtype=torch.bfloat16)
    format_, settings = SCHEMES[name]
    tuned = AutoRound(
        model, tokenizer=tokenizer(), iters=0, disable_opt_rtn=True, device_map="cpu", **settings
    )
    quantized, *_ = tuned.quantize()
    record(weights_of(quantized), folder)
    tuned.save_quantized(str(folder), format=format_)
    for file in folder.glob("*token*"):
        file.unlink()


if __name__ == "__main__":
    for name in SCHEMES:
        write(name)
