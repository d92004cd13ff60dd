"""Run one batch of one file in a process of its own, and print the peak resident memory in bytes.

    python onnxruntime_peak.py model.onnx inputs.npz

A script, not a module: it imports onnxruntime and nothing else, so that the figure is the engine's.
"""

import resource
import sys
from pathlib import Path

import numpy as np
import onnxruntime


def main(file: str, inputs: str) -> None:
    """Two runs, because the first one also plans the memory of the second."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    with np.load(inputs) as feeds:
        batch = dict(feeds)
    for _ in range(2):
        session.run(None, batch)
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
