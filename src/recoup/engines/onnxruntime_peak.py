"""Run one batch of one file in a process of its own, and print the peak resident memory in bytes.

    python onnxruntime_peak.py model.onnx inputs.npz

A script, not a module: it imports onnxruntime and nothing else, so that the figure is the engine's.
"""

import resource
import sys

import numpy as np
import onnxruntime


def main(file: str, inputs: str) -> None:
    """Two runs, because the first one also plans the memory of the second."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    with np.load(inputs) as feeds:
        batch = dict(feeds)
    for _ in range(2):
        session.run(None, batch)
    unit = 1 if sys.platform == "darwin" else 1024
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


if __name__ == "__main__":
    main(*sys.argv[1:])
