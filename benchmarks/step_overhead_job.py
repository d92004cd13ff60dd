"""One cell of the table of step_overhead.py, in a process of its own: prints one line of JSON.

    python step_overhead_job.py '{"measure": "step", "tool": "torchao", "form": "w4", "rows": 2, ...}'

Tools differ in what they put into the model; the model, the batch, the optimizer and the clock are the same.
On a GPU the language model's place is taken by a stack of 4096-wide layers in bfloat16.
"""

import ctypes
import gc
import importlib
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Job = dict[str, Any]
Batch = dict[str, Tensor]
MEMORY_STEPS, COPIES = 3, 50
WIDTH, DEPTH = 4096, 8
# What a user of the tool imports for this, and what its distribution is called.
IMPORTS = {
    "recoup": ("recoup", "recoup"),
    "torchao": ("torchao.quantization.qat", "torchao"),
    "modelopt": ("modelopt.torch.quantization", "nvidia-modelopt"),
    "brevitas": ("brevitas.nn", "brevitas"),
}


def main(job: Job) -> Job:
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    found = MEASURES[job["measure"]](job)
    versions = {"torch": torch.__version__}
    if job["tool"] in IMPORTS:
        versions[job["tool"]] = version(IMPORTS[job["tool"]][1])
    return job | found | {"versions": versions}


def step(job: Job) -> Job:
    """Steps of the float and of the quantized model in turn.

    Both have the same Parameters, and one optimizer: weights that lie elsewhere in memory alone make a step
    up to a tenth faster or slower, for as long as a process lives. And malloc is told to keep what was freed:
    what it gives back to the kernel after one model's step, the other one's has to ask for again, and
    clearing these pages takes a tenth of a step, now here and now there.
    """
    keep_memory()
    batch = batch_of(job)
    models = {"float": load(job), "quantized": load(job)}
    TOOLS[job["tool"]](models["quantized"], batch, job)
    share(models["quantized"], models["float"])
    optimizer = optimizer_of(models["quantized"])
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    losses: dict[str, float] = {}
    warmup = job["warm-up"]
    for _ in range(warmup + job["pairs"]):
        for name, model in models.items():
            seconds, loss = timed(lambda m=model: train(m, optimizer, batch), job["device"])
            seen[name].append(seconds)
            losses.setdefault(name, loss)
    found: Job = {"first losses": losses}
    for clock in ("cpu", "wall"):
        taken = {name: [seconds[clock] for seconds in steps] for name, steps in seen.items()}
        pairs = zip(taken["float"][warmup:], taken["quantized"][warmup:], strict=True)
        ratios = [quantized / unquantized for unquantized, quantized in pairs]
        found[clock] = {"ratio": statistics.median(ratios), "ratios": ratios, **taken}
    return found


def memory(job: Job) -> Job:
    """The most that the first steps hold at once, in a process that does nothing else."""
    batch, model = batch_of(job), load(job)
    TOOLS[job["tool"]](model, batch, job)
    optimizer = optimizer_of(model)
    peak, before = high_water_mark(job["device"])
    for _ in range(MEMORY_STEPS):
        train(model, optimizer, batch)
    return {"bytes before": before, "peak bytes": peak()}


def importing(job: Job) -> Job:
    """Of the library, in a process that has imported torch already."""
    seconds, _ = timed(lambda: importlib.import_module(IMPORTS[job["tool"]][0]), "cpu")
    return seconds


def kernel(job: Job) -> Job:
    """Fake quantization against a copy of the same bytes: the share of the copy's bandwidth.

    A weight is written to before every turn, as an optimizer does, so that nothing is remembered of it.
    """
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": job["device"]}
    # Eight times as many rows: a square of this width would stay in the cache of a large GPU.
    model = nn.Sequential(nn.Linear(WIDTH, 8 * WIDTH, bias=False, **options))
    x = torch.randn(8 * WIDTH, WIDTH, **options)
    with_recoup(model, {"input": x}, job)
    layer = model[0]
    subjects = {"weights": (layer.weight_quantizer, layer.weight)}
    if not isinstance(layer.input_quantizer, nn.Identity):
        subjects["inputs"] = (layer.input_quantizer, x)
    found: Job = {}
    with torch.no_grad():
        for name, (quantizer, tensor) in subjects.items():
            copy, shares = torch.empty_like(tensor), []
            for turn in range(2 * COPIES):
                tensor.mul_(1)
                copying, _ = timed(lambda c=copy, t=tensor: c.copy_(t), job["device"], queued=True)
                quantizing, _ = timed(lambda q=quantizer, t=tensor: q(t), job["device"], queued=True)
                if turn >= COPIES:  # the first half warms up
                    shares.append(copying["wall"] / quantizing["wall"])
            found[f"{name}, share of copy bandwidth"] = statistics.median(shares)
    return found


MEASURES: dict[str, Callable[[Job], Job]] = {
    "step": step,
    "memory": memory,
    "import": importing,
    "kernel": kernel,
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-6)


def timed(run: Callable[[], Any], device: str, *, queued: bool = False) -> tuple[dict[str, float], Any]:
    """CPU seconds of all threads, seconds on the clock (a GPU's own, where there is one), and the result.

    With `queued` a GPU begins when everything is launched, so that waiting for launches is not timed.
    """
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        cpu = time.process_time()
        if queued:
            torch.cuda._sleep(5_000_000)
        start.record()
        result = run()
        end.record()
        torch.cuda.synchronize()
        wall = start.elapsed_time(end) / 1000
    else:
        cpu, clock = time.process_time(), time.perf_counter()
        result = run()
        wall = time.perf_counter() - clock
    seconds = {"cpu": time.process_time() - cpu, "wall": wall}
    return seconds, result.item() if isinstance(result, Tensor) and result.ndim == 0 else None


def high_water_mark(device: str) -> tuple[Callable[[], int], int]:
    """What reads the most that was held since now, and what is held now."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated, torch.cuda.memory_allocated()
    # What loading freed goes back to the kernel; then the mark, which loading had raised, starts again here.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")

    def peak() -> int:
        held = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert held is not None
        return int(held[1]) * 1024

    return peak, peak()


def share(quantized: nn.Module, unquantized: nn.Module) -> None:
    """Give the float model the Parameters of the quantized one."""
    theirs = dict(quantized.named_parameters(remove_duplicate=False))
    for name, _ in list(unquantized.named_parameters(remove_duplicate=False)):
        path, _, leaf = name.rpartition(".")
        setattr(unquantized.get_submodule(path), leaf, theirs[name])


def keep_memory() -> None:
    """All of malloc's memory comes from its heap, and stays there (mallopt(3), glibc)."""
    mmap_max, trim_threshold = -4, -1
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, 2**31 - 1)):
        raise OSError("this C library's malloc cannot be told to keep its memory")


def load(job: Job) -> nn.Module:
    if job["device"] == "cuda":
        torch.manual_seed(0)
        return Stack("cuda")
    from transformers import AutoModelForCausalLM

    shape = {"num_hidden_layers": job["layers"]} if "layers" in job else {}
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, **shape)
    model.config.use_cache = False
    return model.train()


def batch_of(job: Job) -> Batch:
    """What is in it does not matter to how long a step takes."""
    rows, window = job["rows"], job["window"]
    if job["device"] == "cuda":
        return {"x": torch.randn(rows * window, WIDTH, dtype=torch.bfloat16, device="cuda")}
    ids = torch.randint(1000, 40_000, (rows, window))
    return {"input_ids": ids, "labels": ids}


class Stack(nn.Module):
    """Linear layers between residual connections, in bfloat16; answers with a loss, as a language model."""

    def __init__(self, device: str) -> None:
        super().__init__()
        options: dict[str, Any] = {"bias": False, "dtype": torch.bfloat16, "device": device}
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, **options) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> SimpleNamespace:
        for layer in self.layers:
            x = x + F.silu(layer(x))
        return SimpleNamespace(loss=x.float().square().mean())


def in_float(model: nn.Module, batch: Batch, job: Job) -> None:
    """Nothing: two float models next to each other say how much the clock itself wavers."""


def with_recoup(model: nn.Module, batch: Batch, job: Job) -> None:
    import recoup

    schemes = {"w4": "w4a16", "w4a8": "w4a8", "nvfp4": "nvfp4"}
    plan = recoup.resolve(model, schemes[job["form"]])
    recoup.prepare(model, plan, impl=job["impl"])
    recoup.calibrate(model, [batch])


def with_torchao(model: nn.Module, _batch: Batch, job: Job) -> None:
    from torchao.prototype.qat import NVFP4FakeQuantizeConfig
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    int4 = IntxFakeQuantizeConfig(torch.int4, group_size=32)
    int8 = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    configs: dict[str, Callable[[], QATConfig]] = {
        "w4": lambda: QATConfig(weight_config=int4),
        "w4a8": lambda: QATConfig(activation_config=int8, weight_config=int4),
        "nvfp4": lambda: QATConfig(
            activation_config=NVFP4FakeQuantizeConfig(), weight_config=NVFP4FakeQuantizeConfig()
        ),
    }
    quantize_(
        model,
        configs[job["form"]](),
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and name != "lm_head",
    )


def with_modelopt(model: nn.Module, batch: Batch, job: Job) -> None:
    import modelopt.torch.quantization as mtq

    def of_linears(quantizer: str, **cfg: Any) -> Job:
        return {"quantizer_name": f"*{quantizer}_quantizer", "parent_class": "nn.Linear", "cfg": cfg}

    int4 = of_linears("weight", num_bits=4, block_sizes={-1: 32})
    int8 = of_linears("input", num_bits=8, type="dynamic", block_sizes={-1: None})
    off, no_head = ({"quantizer_name": name, "enable": False} for name in ("*", "*lm_head*"))
    configs: dict[str, Job] = {
        "w4": {"quant_cfg": [off, int4, no_head], "algorithm": "max"},
        "w4a8": {"quant_cfg": [off, int4, int8, no_head], "algorithm": "max"},
        "nvfp4": mtq.NVFP4_DEFAULT_CFG,
    }
    mtq.quantize(model, configs[job["form"]], lambda model: model(**batch))


def with_brevitas(model: nn.Module, _batch: Batch, job: Job) -> None:
    """Every Linear replaced by a QuantLinear with the quantizers of brevitas' own LLM example."""
    if job["form"] == "nvfp4":
        raise NotImplementedError("brevitas publishes no NVFP4 quantizer")
    # brevitas calls it on every input, with None for the names; torch 2.13 has no named tensors any more.
    torch.Tensor.rename = lambda self, _names: self
    from brevitas.nn import QuantLinear
    from brevitas_examples.common.generative.quantizers import (
        Int8DynamicActPerRowFloat,
        IntWeightSymmetricGroupQuant,
    )

    int4 = IntWeightSymmetricGroupQuant.let(bit_width=4, group_size=32, narrow_range=False)
    int8 = Int8DynamicActPerRowFloat.let(
        dynamic_scaling_broadcastable_fn=lambda x, shape: x.view(*shape[:-1], 1),
        permute_dims=None,
        stats_reduce_dim=1,
    )
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            quantized = QuantLinear(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                weight_quant=int4,
                input_quant=int8 if job["form"] == "w4a8" else None,
                device=linear.weight.device,
                dtype=linear.weight.dtype,
            )
            quantized.weight, quantized.bias = linear.weight, linear.bias
            model.set_submodule(name, quantized)


TOOLS: dict[str, Callable[[nn.Module, Batch, Job], None]] = {
    "float": in_float,
    "recoup": with_recoup,
    "torchao": with_torchao,
    "modelopt": with_modelopt,
    "brevitas": with_brevitas,
}

if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
