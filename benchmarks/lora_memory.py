"""Peak memory of QAT with adapters of rank 16 against QAT of everything, each in a process of its own.

    python benchmarks/lora_memory.py ~/.cache/recoup/smollm2-135m-*

Three AdamW steps each. Counted is what is resident above a process that has imported all libraries and has
its kernels compiled: float weights, gradients, the optimizer's state, codes, activations and whatever one
operation needs, at their highest.
"""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from step_overhead_job import MEMORY_STEPS, batch_of, high_water_mark, load, optimizer_of, train
from torch import nn

SCHEME, RANK = "w4a16", 16
WINDOWS = (64, 256)


def main(model: str) -> None:
    print("| tokens a step | activations | full QAT, MB | LoRA, MB | share |")
    print("|---|---|---|---|---|")
    for window in WINDOWS:
        for again, activations in ((False, "kept"), (True, "computed again")):
            job = {"model": model, "rows": 1, "window": window, "again": again, "device": "cpu"}
            full, lora = (measured(job | {"lora": adapters}) for adapters in (False, True))
            row = (window, activations, round(full / 1e6), round(lora / 1e6), f"{lora / full:.0%}")
            print(f"| {' | '.join(map(str, row))} |", flush=True)


def measured(job: dict[str, Any]) -> int:
    """The peak in bytes, in a process of its own."""
    command = [sys.executable, __file__, json.dumps(job)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def peak(job: dict[str, Any]) -> int:
    """Of what one way of training holds at once, above the process with its libraries."""
    import accelerate  # noqa: F401 (what recoup.train imports)
    import transformers.models.llama.modeling_llama  # noqa: F401

    import recoup
    from recoup.train.activations import activations_recomputed

    def prepared(model: nn.Module, batch: Any) -> nn.Module:
        plan = recoup.resolve(model, SCHEME)
        return recoup.calibrate(recoup.prepare(model, plan, impl="compiled"), [batch])

    torch.set_num_threads(1)
    small, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(4, 64)
    prepared(small, x)(x).sum().backward()
    optimizer_of(small).step()
    _, before = high_water_mark("cpu")
    batch, model = batch_of(job), load(job)
    prepared(model, batch)
    if job["lora"]:
        recoup.add_lora(model, rank=RANK)
    model.train()
    held, _ = high_water_mark("cpu")
    optimizer = optimizer_of(model)
    with activations_recomputed(model) if job["again"] else nullcontext():
        for _ in range(MEMORY_STEPS):
            train(model, optimizer, batch)
    return held() - before


if __name__ == "__main__":
    if Path(sys.argv[1]).is_dir():
        main(sys.argv[1])
    else:
        print(peak(json.loads(sys.argv[1])))
