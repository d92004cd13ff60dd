"""One cell of a table of qat_quality.py, in a process of its own: prints one line of JSON.

    python qat_quality_job.py '{"subject": "encoder", "tool": "torchao", "format": "int4", "steps": 40, ...}'

Tools differ in what they put into the model and in how they train it; data, steps, optimizer, schedule and
measurement are the same.
"""

import copy
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import qat_quality_cnn
import qat_quality_encoder
import qat_quality_language_model
import torch
from torch import Tensor, nn

SUBJECTS: dict[str, Any] = {
    "language model": qat_quality_language_model,
    "encoder": qat_quality_encoder,
    "cnn": qat_quality_cnn,
}
WARMUP = 4
CLIP_NORM = 1.0

Job = dict[str, Any]
Batches = list[dict[str, Tensor]]
Steps = dict[str, Callable[[], Any]]


def main(job: Job) -> Job:
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    subject = SUBJECTS[job["subject"]]
    model, batches, test = subject.load(job)
    found: dict[str, Any] = {}

    def look(name: str) -> None:
        first, *others = subject.measure(model, test).items()
        found[name] = first[1]
        found.update({f"{name} {metric}": value for metric, value in others})
        print(f"{job['tool']} {job['format']}: {name} {found[name]:.4g}", file=sys.stderr, flush=True)

    start = time.process_time()
    model, steps = TOOLS[job["tool"]](model, batches, job)
    for name, step in steps.items():
        before = time.process_time()
        step()
        found[f"{name} cpu seconds"] = round(time.process_time() - before, 1)
        look(name)
    return job | found | {"cpu seconds": round(time.process_time() - start, 1)}


def train_plainly(model: nn.Module, batches: Batches, job: Job) -> None:
    """What a user of torchao writes: AdamW without decay on the model's own loss."""
    steps = len(batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=job["learning_rate"], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, steps))
    model.train()
    for batch in batches:
        model(**batch)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def warmup_cosine(step: int, steps: int) -> float:
    """The schedule of `recoup.train`, written out once more."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - WARMUP) / max(1, steps - WARMUP))))


def in_float(model: nn.Module, batches: Batches, job: Job) -> tuple[nn.Module, Steps]:
    return model, {"float": lambda: None, "trained": lambda: train_plainly(model, batches, job)}


def with_recoup(model: nn.Module, batches: Batches, job: Job) -> tuple[nn.Module, Steps]:
    import recoup
    from recoup.calibrate import correct_biases, gptq
    from recoup.transforms import fuse, smooth

    recipe = recoup.Recipe(scheme=SUBJECTS[job["subject"]].scheme(job["format"]), **job["recipe"])
    settings = recoup.TrainSettings(
        steps=len(batches),
        learning_rate=job["learning_rate"],
        warmup=WARMUP,
        clip_norm=CLIP_NORM,
        evaluate_every=len(batches),
        **job["settings"],
    )
    teacher = copy.deepcopy(model)
    plan = recoup.resolve(fuse(model, batches[0]), recipe)
    recoup.prepare(model, plan)

    def by_gptq() -> None:
        if job["smooth"]:  # as `smooth: true` in a recipe does before `prepare`
            balanced = smooth(copy.deepcopy(teacher), plan, batches)
            model.load_state_dict(balanced.state_dict(), strict=False)
        recoup.calibrate(model, batches, observer="mse")
        gptq(model, batches, samples=job["gptq samples"])

    return model, {
        "round-to-nearest": lambda: recoup.calibrate(model, batches),
        **({"gptq": by_gptq} if job["gptq samples"] else {"bias": lambda: correct_biases(model, batches)}),
        "trained": lambda: recoup.train(model, batches, settings, teacher=teacher),
    }


def with_torchao(model: nn.Module, batches: Batches, job: Job) -> tuple[nn.Module, Steps]:
    if job["subject"] == "cnn":
        return with_torchao_on_a_program(model, batches, job)
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

    return model, {"round-to-nearest": prepare, "trained": lambda: train_plainly(model, batches, job)}


def with_torchao_on_a_program(model: Any, batches: Batches, job: Job) -> tuple[nn.Module, Steps]:
    """QAT of an exported program, which knows convolutions; ranges of inputs follow every batch."""
    from torchao.quantization import pt2e
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    bits = int(job["format"].removeprefix("int"))
    eight: Any = x86.get_default_x86_inductor_quantization_config(is_qat=True)
    weight = replace(eight.weight, quant_min=-(2 ** (bits - 1)), quant_max=2 ** (bits - 1) - 1)
    quantizer = x86.X86InductorQuantizer().set_global(replace(eight, weight=weight))
    prepared = pt2e.allow_exported_model_train_eval(prepare_qat_pt2e(model, quantizer))

    @torch.no_grad()
    def calibrate() -> None:
        prepared.eval()
        for batch in batches:
            prepared(**batch)
        prepared.apply(pt2e.disable_observer)  # it would see the test images, too

    def train() -> None:
        prepared.apply(pt2e.enable_observer)
        train_plainly(prepared, batches, job)
        prepared.apply(pt2e.disable_observer)

    return prepared, {"round-to-nearest": calibrate, "trained": train}


TOOLS: dict[str, Callable[[nn.Module, Batches, Job], tuple[nn.Module, Steps]]] = {
    "float": in_float,
    "recoup": with_recoup,
    "torchao": with_torchao,
}

if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
