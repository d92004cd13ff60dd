"""Read many damaged files, one after the other, in a process of its own.

    python -m tests.engines.reading READER FILE COUNT READER FILE COUNT ...

Prints a line of JSON for each: how many were read, how many refused, and what else happened.
"""

import json
import os
import random
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from recoup.engines import llama_cpp
from recoup.engines.gguf_file import read as read_gguf
from recoup.engines.onnx_file import check_onnx
from recoup.engines.onnxruntime import OnnxModel
from recoup.engines.pytorch import PytorchModel
from recoup.engines.pytorch_archive import check_archive
from recoup.engines.safetensors_file import check_safetensors, read_safetensors
from tests.engines import mutations

SECONDS = 30  # for one case
FEW = 100
ROOM = 2**30  # bytes of addresses above what the whole file takes; what a header claims is more


def _both_of_safetensors(file: Path) -> None:
    check_safetensors(file.parent)
    read_safetensors(file)


Read = Callable[[Path], Any]
# What reads a file, the mutation that knows its format, and whether the engine itself runs.
READERS: dict[str, tuple[Read, mutations.Mutation]] = {
    "safetensors": (_both_of_safetensors, mutations.safetensors),
    "gguf": (read_gguf, mutations.gguf),
    "onnx": (check_onnx, mutations.onnx_fields),
    "pt2": (check_archive, mutations.archive),
    "llama.cpp": (lambda file: llama_cpp.LlamaCpp(file, threads=1), mutations.gguf),
    "onnxruntime": (lambda file: OnnxModel(file, threads=1), mutations.onnx_fields),
    "torch": (PytorchModel, mutations.archive),
}


def main(*asked: str) -> None:
    """One reader after the other, each in a process that is forked from this one."""
    torch.set_num_threads(1)
    for reader, source, count in zip(asked[::3], asked[1::3], asked[2::3], strict=True):
        file = Path(source)
        READERS[reader][0](file)  # what it imports is imported once
        sys.stdout.flush()
        if child := os.fork():
            _, status = os.waitpid(child, 0)
            if status:
                seed = file.with_name("seed").read_text()
                print(json.dumps({"reader": reader, "wrong": [f"seed {seed} ended the process: {status}"]}))
        else:
            found = damaged(file, int(count), *READERS[reader])
            print(json.dumps({"reader": reader, **found}), flush=True)
            os._exit(0)


def damaged(file: Path, count: int, read: Read, structured: mutations.Mutation) -> dict[str, Any]:
    """Every second case is noise, but for engines that are asked little: they get files of the right form."""
    raw, start = file.read_bytes(), time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_addresses() + ROOM, hard))
    found: Counter[str] = Counter()
    wrong: list[str] = []
    for seed in range(count):
        mutation = mutations.noise if seed % 2 and count > FEW else structured
        file.write_bytes(mutation(raw, random.Random(seed)))
        file.with_name("seed").write_text(str(seed))
        signal.alarm(SECONDS)  # ends the process, native code or not
        try:
            read(file)
            found["read"] += 1
        except ValueError as error:
            found["refused"] += 1
            if str(file.parent) not in str(error) or "\n" in str(error):
                wrong.append(f"seed {seed}: {error!r}")
        except Exception as error:  # noqa: BLE001 (it is what is looked for)
            wrong.append(f"seed {seed}: {error!r}")
        signal.alarm(0)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {**found, "wrong": wrong, "grown": grown, "seconds": time.monotonic() - start}


def _addresses() -> int:
    """Bytes of this process's address space."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    main(*sys.argv[1:])
