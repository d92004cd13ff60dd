"""Read the sequences of one batch in a process of its own, and print the peak resident memory in bytes.

    python llama_cpp_peak.py model.gguf ids.json

A script, not a module: it imports llama.cpp and nothing else, so that the figure is the engine's.
"""

import json
import resource
import sys
from pathlib import Path
from typing import Any

import xllamacpp

engine: Any = xllamacpp  # an extension, of which no type is known


def main(file: str, ids: str) -> None:
    """One pass over each sequence."""
    sequences = json.loads(Path(ids).read_text())
    params = engine.CommonParams()
    params.model.path = file
    params.n_ctx = params.n_batch = params.n_ubatch = 1 + max(256, *map(len, sequences))
    params.n_parallel, params.fit_params, params.warmup, params.verbosity = 1, False, False, -1
    server = engine.Server(params)
    for sequence in sequences:
        server.handle_completions({"prompt": sequence, "n_predict": 1, "cache_prompt": False})
    print(peak_bytes())


def peak_bytes() -> int:
    """Of this process alone: `getrusage` of Linux counts what the parent held when it started this one."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main(*sys.argv[1:])
