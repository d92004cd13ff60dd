"""What a torch.export program of quantized weights costs, next to the float one, in torch on a CPU.

    python benchmarks/pytorch_programs.py minilm --schemes w8a8 w4a16 --batch 8 --tokens 64

"time" and "size" are over the float program's: medians of interleaved runs in one process, one thread.
"eager" is the float model itself, not exported. Weights are rounded to nearest; quality is no subject here.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import recoup
from recoup.engines.pytorch import PytorchModel, size_bytes
from recoup.export import TARGETS
from recoup.tasks.assets import fetch

MODELS = ("minilm", "smollm2-135m")


def load(name: str) -> nn.Module:
    from transformers import AutoModel, AutoModelForCausalLM

    kind = AutoModel if name == "minilm" else AutoModelForCausalLM
    model = kind.from_pretrained(fetch(name), dtype=torch.float32)
    model.config.use_cache = False
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--schemes", nargs="+", default=["w8a8", "w4a16"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=11)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
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
