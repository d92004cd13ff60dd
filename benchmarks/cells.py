"""The cells of a benchmark's table: a process of its own for each, of a peer in the peer's environment.

What is measured stays in a file of results and is not measured again; a cell that failed is tried again.
"""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, SCRATCH = HERE / "results", HERE / "scratch"
# Of a job, what says where things lie on this machine: nothing to anybody else.
PLACES = {"model", "data", "artefacts"}
# How a traceback ends, where the message may go on for more lines.
RAISED = re.compile(r"[\w.]+(Error|Exception)\b")

Job = dict[str, Any]


def measured(
    file: Path,
    script: str,
    jobs: Mapping[str, tuple[str, Job]],
    *,
    threads: int,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Job]:
    """All cells that the file of results holds, once every job is among them.

    The file says on which machine it was begun; a cell that was measured on another one says so itself.

    Args:
        file: of results; written after every cell.
        script: what a cell's process runs, a file beside this one; it gets the job as JSON and ends its
            output with one line of JSON.
        jobs: by the name of the cell, the Python that runs it and what it is told.
        threads: that the jobs use.
        environment: variables that are set for these processes.
    """
    done: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    here = machine(threads)
    done.setdefault("machine", here)
    cells = done.setdefault("cells", {})
    for name, (python, job) in jobs.items():
        if name in cells and "error" not in cells[name]:
            continue
        print(name, file=sys.stderr, flush=True)
        cells[name] = run(python, script, job, environment or {})
        if done["machine"] != here:
            cells[name]["machine"] = here
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(done, indent=1) + "\n")
    return cells


def run(python: str, script: str, job: Job, environment: Mapping[str, str]) -> Job:
    """What one cell measured, or the error that it ended with, in one line."""
    done = subprocess.run(
        [python, HERE / script, json.dumps(job)],
        capture_output=True, text=True, env=os.environ | environment, check=False,
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        error = next((line for line in reversed(lines) if RAISED.match(line)), lines[-1])
        print(f"  failed: {error}", file=sys.stderr, flush=True)
        return _without_places(job) | {"error": error}
    return _without_places(json.loads(done.stdout.splitlines()[-1]))


def python_of(peer: str) -> str:
    """The Python of a peer's own environment, made from the pins in peers/ where it does not exist.

    `PEER.no-deps.txt` beside `PEER.txt` names what is installed after it and without what it asks for.
    """
    folder = SCRATCH / f"venv-{peer}"
    python, stamp = folder / "bin" / "python", folder / "complete"
    if not stamp.exists():
        print(f"making an environment for {peer}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = [python, "-m", "pip", "install", "-q"]
        # From the repository's root, where `-e .` is recoup itself.
        subprocess.run([*install, "-r", HERE / "peers" / f"{peer}.txt"], check=True, cwd=HERE.parent)
        alone = HERE / "peers" / f"{peer}.no-deps.txt"
        if alone.exists():
            subprocess.run([*install, "--no-deps", "-r", alone], check=True)
        stamp.touch()
    return str(python)


def machine(threads: int) -> dict[str, str]:
    """Where this was measured."""
    described = Path("/proc/cpuinfo").read_text()
    names = [line.partition(":")[2].strip() for line in described.splitlines() if "model name" in line]
    simd = next((name for name in ("avx512_vnni", "avx512f", "avx2") if name in described), "none")
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": str(os.cpu_count()),
        "threads": str(threads),
        "widest vector instructions": simd,
        "python": platform.python_version(),
    }


def _without_places(cell: Job) -> Job:
    return {key: value for key, value in cell.items() if key not in PLACES}
