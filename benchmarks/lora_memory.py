"""Peak memory of QAT with adapters against QAT of everything, each in a process of its own.

    python benchmarks/lora_memory.py ~/.cache/recoup/smollm2-135m-*

Three AdamW steps each. Counted is resident memory above that of the process with all libraries imported and
nothing loaded: the float weights, gradients, the optimizer's state, codes and activations, all at once.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from step_overhead_job import MEMORY_STEPS, batch_of, high_water_mark, load, optimizer_of, train

SCHEME, RANK, ROWS = "w4a16", 16, 1
WINDOWS = (64, 256)
WAYS = ("full", "lora", "scales")


def main(model: str) -> None:
    print("| tokens a step | activations | full QAT, GB | LoRA, share of it | scales alone, share of it |")
    print("|---|---|---|---|---|")
    for window in WINDOWS:
        for again in (False, True):
            job = {"model": model, "rows": ROWS, "window": window, "again": again, "device": "cpu"}
            peaks = {way: measured(job | {"way": way}) for way in WAYS}
            shares = " | ".join(f"{peaks[way] / peaks['full']:.0%}" for way in WAYS[1:])
            kept = "computed again" if again else "kept"
            print(f"| {window} | {kept} | {peaks['full'] / 1e9:.2f} | {shares} |", flush=True)


def measured(job: dict[str, Any]) -> int:
    """The peak in bytes, in a process of its own."""
    command = [sys.executable, __file__, json.dumps(job)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def peak(job: dict[str, Any]) -> int:
    """Of what one way of training holds at once, above the process with its libraries."""
    import accelerate  # noqa: F401 (what train() would import)
    import transformers.models.llama.modeling_llama  # noqa: F401

    import recoup
    from recoup.train.activations import activations_recomputed

    torch.set_num_threads(1)
    torch.manual_seed(0)
    _, before = high_water_mark("cpu")
    batch, model = batch_of(job), load(job)
    ranges = "learned" if job["way"] == "scales" else None
    plan = recoup.resolve(model, recoup.Recipe(scheme=SCHEME, weight_ranges=ranges))
    recoup.calibrate(recoup.prepare(model, plan), [batch])
    if job["way"] == "lora":
        recoup.add_lora(model, rank=RANK)
    if job["way"] == "scales":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".weight_quantizer." in name)
    model.train()
    held, _ = high_water_mark("cpu")
    optimizer = optimizer_of(model)
    if job["again"]:
        with activations_recomputed(model):
            steps(model, optimizer, batch)
    else:
        steps(model, optimizer, batch)
    return held() - before


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> None:
    for _ in range(MEMORY_STEPS):
        train(model, optimizer, batch)


if __name__ == "__main__":
    if Path(sys.argv[1]).exists():
        main(sys.argv[1])
    else:
        print(peak(json.loads(sys.argv[1])))
