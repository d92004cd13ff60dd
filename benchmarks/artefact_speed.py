"""How fast what recoup exports runs, next to the float model in torch and to the engines' own quantizers.

    .venv/bin/python benchmarks/artefact_speed.py                      all of it, half an hour of two cores
    .venv/bin/python benchmarks/artefact_speed.py --subjects encoder   MiniLM alone

MiniLM on 64 tokens and EfficientNet-Lite0 on 224 x 224 pixels, 1 and 8 samples; SmolLM2-135M, 64 words after
32. Everything that runs a subject takes turns in one process (`artefact_speed_job.py`), which rests before
each turn; the table has the median of the ratios to the first row's time in the same turn. Memory is the peak
of a process of its own, with torch only where torch runs. Codes are rounded to nearest: speed does not depend
on how well.

A cell that is measured already is not measured again: remove it from the results to repeat it.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from artefact_speed_job import SUBJECTS
from cells import RESULTS, SCRATCH, Job, measured

LOOKS = {
    "encoder": "MiniLM, 22.7 M parameters",
    "cnn": "EfficientNet-Lite0, 4.65 M parameters",
    "llm": "SmolLM2-135M",
}
OURS, THEIRS, FLOAT = "#0b6e4f", "#b5543c", "#9a9a9a"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--artefacts", type=Path, default=SCRATCH / "artefacts", help="where files are kept")
    asked = parser.parse_args()
    file = RESULTS / "artefact_speed.json"
    cells = measured(file, "artefact_speed_job.py", dict(jobs(asked)), threads=asked.threads)
    print("\n\n".join(as_text(cells, subject) for subject in SUBJECTS))
    draw(cells, file.with_suffix(".svg"))


def jobs(asked: argparse.Namespace) -> Iterator[tuple[str, tuple[str, Job]]]:
    """Every cell that was asked for, files first: its name, and who measures it."""
    for name in asked.subjects:
        subject = SUBJECTS[name]()
        common: Job = {"subject": name, "artefacts": str(asked.artefacts), "threads": asked.threads}
        for way, of in subject.ways.items():
            if of.write is not None:
                yield f"write {name}, {way}", (sys.executable, common | {"measure": "write", "way": way})
        for setting in subject.settings:
            # generating takes seconds, and a pass milliseconds
            counts = {"turns": 5, "repeats": 0} if name == "llm" else {"turns": asked.turns, "repeats": 3}
            job = common | counts | {"measure": "time", "setting": setting, "without": []}
            yield f"time {name}, {setting}", (sys.executable, job)
        first = next(iter(subject.settings))
        for way in subject.ways:
            job = common | {"measure": "peak", "way": way, "setting": first}
            yield f"peak {name}, {way}", (sys.executable, job)


def as_text(cells: dict[str, Any], name: str) -> str:
    """A subject's table as Markdown."""
    subject = SUBJECTS[name]()
    ways = list(subject.ways)
    heads = [f"{setting}, times {ways[0]}" for setting in subject.settings]
    lines = [f"| {LOOKS[name]} | {' | '.join(heads)} | file, MB | peak, MB |"]
    lines.append(f"|---|{'--:|' * (len(heads) + 2)}")
    for way in ways:
        found = [cells.get(f"time {name}, {setting}", {}).get("speedup", {}) for setting in subject.settings]
        speedups = [f"{times[way]:.2f}" if way in times else "" for times in found]
        sizes = (
            cells.get(f"write {name}, {way}", {}).get("bytes"),
            cells.get(f"peak {name}, {way}", {}).get("peak bytes"),
        )
        lines.append(f"| {' | '.join([way, *speedups, *(f'{s / 1e6:.0f}' if s else '' for s in sizes)])} |")
    return "\n".join(lines)


def draw(cells: dict[str, Any], file: Path) -> None:
    """Bars of speed over the float model in torch, with quartiles."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.fonttype"] = "none"
    import matplotlib.pyplot as plt

    times = {name: found for name, found in cells.items() if name.startswith("time") and "speedups" in found}
    if not times:
        return
    rows = [len(found["speedups"]) for found in times.values()]
    figure, panels = plt.subplots(
        len(times), 1, figsize=(8, 0.26 * sum(rows) + 0.8 * len(rows)), layout="constrained",
        gridspec_kw={"height_ratios": rows}, squeeze=False,
    )  # fmt: skip
    for axes, (name, found) in zip(panels[:, 0], times.items(), strict=True):
        axes.set_title(name.removeprefix("time "), size=9, loc="left")
        for y, (way, ratios) in enumerate(found["speedups"].items()):
            colour = OURS if way.startswith("recoup") else THEIRS if "'s " in way or "ao" in way else FLOAT
            middle, seen = found["speedup"][way], sorted(ratios)
            axes.barh(y, middle, color=colour, height=0.75)
            axes.plot([seen[len(seen) // 4], seen[-1 - len(seen) // 4]], [y, y], color="#222", lw=0.8)
            axes.annotate(f"{middle:.2f}", (max(middle, seen[-1 - len(seen) // 4]), y), (4, 0),
                          textcoords="offset points", va="center", size=8,
                          bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})  # fmt: skip
        axes.set_yticks(range(len(found["speedups"])), list(found["speedups"]), size=8)
        axes.invert_yaxis()
        axes.axvline(1, color="#222", lw=0.8)
        axes.margins(x=0.1)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.tick_params(axis="y", length=0)
    panels[-1, 0].set_xlabel("speed over the first row's", size=8)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
