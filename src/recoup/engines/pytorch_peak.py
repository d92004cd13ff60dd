"""Run one batch of one program in a process of its own, and print the peak resident memory in bytes.

    python pytorch_peak.py model.pt2 inputs.safetensors

A script, not a module: it imports torch and safetensors alone, so that the figure is the engine's. The file
was looked through by whoever starts this.
"""

import resource
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def main(file: str, inputs: str) -> None:
    """Two runs, because the first one also makes what the second one keeps."""
    program = torch.export.load(file).module()
    values = load_file(inputs)
    named = {n.removeprefix("name."): v for n, v in values.items() if n.startswith("name.")}
    places = sorted((n for n in values if n.startswith("place.")), key=lambda n: int(n.partition(".")[2]))
    given = [values[name] for name in places]
    with torch.no_grad():
        for _ in range(2):
            program(*given, **named)
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
