"""One cell of the table of qat_quality.py, in a process of its own: prints one line of JSON.

    python qat_quality_job.py '{"tool": "torchao", "format": "int4", "model": ..., "steps": 40, ...}'

Tools differ in what they put into the model and in how they train it; text, steps, optimizer, schedule and
measurement are the same.
"""

import copy
import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WARMUP = 4
CLIP_NORM = 1.0


def main(job: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    model.config.use_cache = False
    tokens = np.load(job["tokens"])
    test = torch.from_numpy(tokens["test"])
    batches = list(torch.from_numpy(tokens["train"])[: job["steps"]])
    found: dict[str, Any] = {}

    def look(name: str) -> None:
        found[name] = perplexity(model, test)
        print(f"{job['tool']} {job['format']}: {name} {found[name]:.4g}", file=sys.stderr, flush=True)

    start = time.process_time()
    for name, step in TOOLS[job["tool"]](model, batches, job).items():
        before = time.process_time()
        step()
        found[f"{name} cpu seconds"] = round(time.process_time() - before, 1)
        look(name)
    return job | found | {"cpu seconds": round(time.process_time() - start, 1)}


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor) -> float:
    """Of every token but the first of each window; windows are (windows, tokens)."""
    model.eval()
    losses = [
        F.cross_entropy(
            model(input_ids=ids).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
        )
        for ids in windows.split(8)
    ]
    return math.exp(min(torch.cat(losses).double().mean().item(), 700.0))


def train_plainly(model: nn.Module, batches: list[Tensor], job: dict[str, Any]) -> None:
    """What a user of torchao writes: AdamW without decay on the model's own loss."""
    steps = len(batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=job["learning_rate"], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, steps))
    model.train()
    for ids in batches:
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def warmup_cosine(step: int, steps: int) -> float:
    """The schedule of `recoup.train`, written out once more."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - WARMUP) / max(1, steps - WARMUP))))


Steps = dict[str, Callable[[], Any]]


def in_float(model: nn.Module, batches: list[Tensor], job: dict[str, Any]) -> Steps:
    return {"float": lambda: None, "trained": lambda: train_plainly(model, batches, job)}


def with_recoup(model: nn.Module, batches: list[Tensor], job: dict[str, Any]) -> Steps:
    import recoup
    from recoup.calibrate import gptq
    from recoup.transforms import smooth

    schemes = {"int4": "w4a8", "int3": "w3a16", "int2": "w2a16", "mxfp4": "mxfp4", "nvfp4": "nvfp4"}
    samples = [{"input_ids": ids, "labels": ids} for ids in batches]
    recipe = recoup.Recipe(scheme=schemes[job["format"]], **job["recipe"])
    settings = recoup.TrainSettings(
        steps=len(batches),
        learning_rate=job["learning_rate"],
        warmup=WARMUP,
        clip_norm=CLIP_NORM,
        evaluate_every=len(batches),
        **job["settings"],
    )
    teacher = copy.deepcopy(model)
    plan = recoup.resolve(model, recipe)
    recoup.prepare(model, plan)

    def calibrate() -> None:
        if job["smooth"]:  # as `smooth: true` in a recipe does before `prepare`
            balanced = smooth(copy.deepcopy(teacher), plan, samples)
            model.load_state_dict(balanced.state_dict(), strict=False)
        recoup.calibrate(model, samples, observer="mse")
        gptq(model, samples, samples=job["gptq samples"])

    return {
        "round-to-nearest": lambda: recoup.calibrate(model, samples),
        "gptq": calibrate,
        "trained": lambda: recoup.train(model, samples, settings, teacher=teacher),
    }


def with_torchao(model: nn.Module, batches: list[Tensor], job: dict[str, Any]) -> Steps:
    from torchao.prototype.qat import MXFakeQuantizeConfig, NVFP4FakeQuantizeConfig
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    configs: dict[str, Callable[[], QATConfig]] = {
        "int4": lambda: QATConfig(
            activation_config=IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
            weight_config=IntxFakeQuantizeConfig(torch.int4, group_size=32),
        ),
        "int3": lambda: QATConfig(weight_config=IntxFakeQuantizeConfig(torch.int3, group_size=32)),
        "int2": lambda: QATConfig(weight_config=IntxFakeQuantizeConfig(torch.int2, group_size=32)),
        "mxfp4": lambda: QATConfig(
            activation_config=MXFakeQuantizeConfig(), weight_config=MXFakeQuantizeConfig()
        ),
        "nvfp4": lambda: QATConfig(
            activation_config=NVFP4FakeQuantizeConfig(), weight_config=NVFP4FakeQuantizeConfig()
        ),
    }

    def prepare() -> None:
        quantize_(
            model,
            configs[job["format"]](),
            filter_fn=lambda module, name: isinstance(module, nn.Linear) and name != "lm_head",
        )

    return {"round-to-nearest": prepare, "trained": lambda: train_plainly(model, batches, job)}


TOOLS: dict[str, Callable[[nn.Module, list[Tensor], dict[str, Any]], Steps]] = {
    "float": in_float,
    "recoup": with_recoup,
    "torchao": with_torchao,
}

if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
