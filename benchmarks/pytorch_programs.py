"""What a torch.export program of quantized weights costs, next to the float one, in torch on a CPU.

    python benchmarks/pytorch_programs.py minilm --schemes w8a8 w4a16 --batch 8 --tokens 64

"time" and "size" are over the float program's: medians of interleaved runs in one process, one thread.
"eager" is the float model itself, not exported. Weights are rounded to nearest; quality is no subject here.
"""

import argparse
import hashlib
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import recoup
from recoup.engines.pytorch import PytorchModel, size_bytes
from recoup.export import TARGETS
from recoup.tasks.assets import fetch

PACKED = 64  # tokens, and the group of the operators that are measured alone
MODELS = ("minilm", "smollm2-135m")


def load(name: str) -> nn.Module:
    from transformers import AutoModel, AutoModelForCausalLM

    kind = AutoModel if name == "minilm" else AutoModelForCausalLM
    model = kind.from_pretrained(fetch(name), dtype=torch.float32)
    model.config.use_cache = False
    return model.eval()


def operators() -> None:
    """torch's packed operators for weights, over `linear` in float32; widths as in MiniLM."""
    x, weight = torch.randn(PACKED, 384), torch.randn(384, 384)
    codes = torch.randint(-8, 8, (384, 384), dtype=torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes + 8, 1)
    integers, bytes_of = torch.randint(-127, 128, x.shape, dtype=torch.int8), codes.to(torch.int8)
    ways: dict[str, Any] = {
        "linear": lambda: nn.functional.linear(x, weight),
        "_int_mm": lambda: torch._int_mm(integers, bytes_of.t()),
    }
    for dtype in (torch.float32, torch.bfloat16):
        y, scales = x.to(dtype), torch.ones(384 // PACKED, 384, 2).to(dtype)
        ways |= {
            f"_weight_int4pack_mm {dtype}": partial(
                torch._weight_int4pack_mm_for_cpu, y, packed, PACKED, scales
            ),
            f"_weight_int8pack_mm {dtype}": partial(
                torch._weight_int8pack_mm, y, bytes_of, torch.ones(384, dtype=dtype)
            ),
        }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(22):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        print(f"{name:36} {statistics.median(times) / statistics.median(seconds['linear']):.2f}")
    print("layout", hashlib.sha256(packed.numpy().tobytes()).hexdigest()[:8])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=(*MODELS, "operators"))
    parser.add_argument("--schemes", nargs="+", default=["w8a8", "w4a16"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=11)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if given.model == "operators":
        print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
        operators()
        return
    ids = torch.randint(5, 1000, (max(2, given.batch), given.tokens))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if given.model != "minilm":
        del batch["attention_mask"]
    runs: dict[str, Any] = {"eager": load(given.model)}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "float"
        folder.mkdir()
        TARGETS["pytorch"].write(load(given.model), folder, batch)
        folders = {"float": folder}
        for scheme in given.schemes:
            model = recoup.ptq(load(given.model), scheme, [batch])
            folders[scheme] = Path(temporary) / scheme
            print(scheme, recoup.export(model, folders[scheme], "pytorch", example=batch), flush=True)
            del model
        for name, folder in folders.items():
            runs[name], sizes[name] = PytorchModel(folder), size_bytes(folder)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        batch = {name: value[: given.batch] for name, value in batch.items()}
        with torch.no_grad():
            for turn in range(given.runs + 2):
                for name, model in runs.items():
                    start = time.perf_counter()
                    model(**batch)
                    if turn >= 2:
                        seconds[name].append(time.perf_counter() - start)
    base = statistics.median(seconds["float"])
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {given}")
    for name, times in seconds.items():
        size = f"{sizes[name] / sizes['float']:.2f}" if name in sizes else "-"
        print(f"{name:12} time {statistics.median(times) / base:.2f} size {size}")


if __name__ == "__main__":
    main()
