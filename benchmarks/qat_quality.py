"""How much of the quality lost to quantization comes back in a few steps of training: recoup next to torchao.

    .venv/bin/python benchmarks/qat_quality.py              all of it, about two hours on two cores
    .venv/bin/python benchmarks/qat_quality.py --subjects encoder --formats int2 --threads 1

Three subjects, each in a file of its own: a language model, an encoder and a convolutional network. Every
cell of their tables is a process of its own (`qat_quality_job.py`): the metric of float, round-to-nearest
and trained. The control is the float model trained in the same way, so that getting used to the data is not
taken for recovery:

    recovered = 1 - (trained - float trained) / (round-to-nearest - float)

torchao runs in an environment of its own that this script makes. A cell that is measured already is not
measured again: remove results/qat_quality.json, or the cell in it, to repeat it.
"""

import argparse
import os
import sys
from typing import Any

from cells import RESULTS, SCRATCH, Job, measured, python_of
from qat_quality_job import SUBJECTS

TOOLS = ("recoup", "torchao")
# glibc would hand the memory of every large tensor back to the kernel, and pay for its pages again.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=[*SUBJECTS])
    parser.add_argument("--formats", nargs="+", help="of those of the subjects; all of them where absent")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--steps", type=int, help="the subject's own where absent")
    parser.add_argument("--learning-rate", type=float, help="the subject's own where absent")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args()
    pythons = {"recoup": sys.executable, "float": sys.executable}
    if "torchao" in asked.tools:
        pythons["torchao"] = python_of("torchao")
    for subject in asked.subjects:
        measure(subject, asked, pythons)


def measure(name: str, asked: argparse.Namespace, pythons: dict[str, str]) -> None:
    """The table of one subject, printed and drawn."""
    subject = SUBJECTS[name]
    formats = [format_ for format_ in subject.FORMATS if format_ in (asked.formats or subject.FORMATS)]
    steps, rate = asked.steps or subject.STEPS, asked.learning_rate or subject.LEARNING_RATE
    places = subject.prepare(SCRATCH, steps)
    jobs: dict[str, tuple[str, Job]] = {}
    for tool, format_ in [("float", "float32"), *((t, f) for f in formats for t in asked.tools)]:
        recoup = {**subject.RECOUP, "smooth": format_ in subject.SMOOTH} if tool == "recoup" else {}
        job = {"subject": name, "tool": tool, "format": format_, "steps": steps, "learning_rate": rate}
        jobs[cell_name(name, tool, format_, steps, rate)] = (
            pythons[tool],
            job | {"threads": asked.threads} | places | recoup,
        )
    cells = measured(
        RESULTS / "qat_quality.json",
        "qat_quality_job.py",
        jobs,
        threads=asked.threads,
        environment=KEEP_MEMORY,
    )
    rows = recovered(name, cells, steps, rate)
    print(as_text(name, rows))
    draw(name, rows, steps)


def cell_name(subject: str, tool: str, format_: str, steps: int, learning_rate: float) -> str:
    """Those of the language model came first, and do not say it."""
    of_subject = "" if subject == "language model" else f"{subject}, "
    return f"{of_subject}{tool} {format_}, {steps} steps, learning rate {learning_rate:g}"


def recovered(name: str, cells: dict[str, Any], steps: int, learning_rate: float) -> list[dict[str, Any]]:
    """One row for each format and tool; `recovered` is 1 where training leaves nothing of the loss."""
    control = cells[cell_name(name, "float", "float32", steps, learning_rate)]
    rows: list[dict[str, Any]] = []
    for format_ in SUBJECTS[name].FORMATS:
        for tool in TOOLS:
            cell = cells.get(cell_name(name, tool, format_, steps, learning_rate))
            if cell is None:
                continue
            row = {"format": format_, "tool": tool, **cell, "float": control["float"]}
            row["float trained"] = control["trained"]
            if "float accuracy" in control:
                row["float accuracy"] = control["float accuracy"]
                row["float trained accuracy"] = control["trained accuracy"]
            if "trained" in cell:
                lost = cell["round-to-nearest"] - control["float"]
                row["recovered"] = 1 - (cell["trained"] - control["trained"]) / lost
            rows.append(row)
    return rows


def as_text(name: str, rows: list[dict[str, Any]]) -> str:
    """The table as Markdown."""
    subject = SUBJECTS[name]
    lines = [
        f"{subject.NAME}, {subject.METRIC}: float {looked(rows[0], 'float')}, float trained in the same way "
        f"{looked(rows[0], 'float trained')}",
        "",
        "| format | tool | round-to-nearest | calibrated | trained | recovered | training, CPU s |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = [subject.FORMATS[row["format"]], row["tool"]]
        if "trained" in row:
            calibrated = next((looked(row, way) for way in ("gptq", "bias") if way in row), "")
            cells += [looked(row, "round-to-nearest"), calibrated, looked(row, "trained")]
            cells += [f"{row['recovered']:.0%}", f"{row['trained cpu seconds']:.0f}"]
        else:
            cells += [f"fails: {row['error'][:80]}", "", "", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def looked(row: dict[str, Any], name: str) -> str:
    """The metric, and the accuracy where there is one."""
    accuracy = row.get(f"{name} accuracy")
    return written(row[name]) + ("" if accuracy is None else f" ({accuracy:.1%})")


def written(value: float) -> str:
    """Four places of a share, four digits of a perplexity."""
    return f"{value:.4f}" if value <= 1 else f"{value:,.4g}"


def draw(name: str, rows: list[dict[str, Any]], steps: int) -> None:
    """The metric by format, perplexity on a logarithmic axis: where each tool starts and where it ends."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.fonttype"] = "none"
    import matplotlib.pyplot as plt

    subject = SUBJECTS[name]
    colours = {"recoup": "#0b6e4f", "torchao": "#b5543c"}
    formats = [format_ for format_ in subject.FORMATS if any(row["format"] == format_ for row in rows)]
    figure, axes = plt.subplots(figsize=(8, 0.75 * len(formats) + 1.6), layout="constrained")
    for row in rows:
        y = formats.index(row["format"]) + (-0.16 if row["tool"] == "recoup" else 0.16)
        colour = colours[row["tool"]]
        if "trained" not in row:
            axes.text(rows[0]["float"] * 1.02, y, f"{row['tool']} fails", va="center", color=colour, size=9)
            continue
        start, end = row["round-to-nearest"], row["trained"]
        axes.plot([start, end], [y, y], color=colour, lw=1.2, zorder=1)
        axes.scatter([start], [y], s=34, facecolor="white", edgecolor=colour, zorder=2)
        axes.scatter([end], [y], s=34, color=colour, zorder=2)
        axes.annotate(
            f"{written(end)}  ({row['recovered']:.0%})", (end, y), (6, 6), textcoords="offset points", size=8
        )
    axes.axvline(rows[0]["float"], color="#777", lw=1, ls=":")
    axes.axvline(rows[0]["float trained"], color="#222", lw=1)
    if subject.METRIC == "perplexity":
        axes.set_xscale("log")
    axes.set_yticks(range(len(formats)), [subject.FORMATS[format_] for format_ in formats])
    axes.set_ylim(len(formats) - 0.5, -0.5)
    axes.set_xlabel(
        f"{subject.METRIC}, lower is better; line: float trained in the same way, dotted: float",
        size=8,
        loc="right",
    )
    handles = [
        plt.Line2D([], [], color=c, marker="o", label=f"{tool}, trained") for tool, c in colours.items()
    ]
    handles.append(plt.Line2D([], [], color="#777", marker="o", mfc="white", ls="", label="round-to-nearest"))
    figure.legend(handles=handles, fontsize=8, frameon=False, loc="outside lower right", ncols=3)
    title = f"{subject.NAME}, {steps} steps of {subject.BATCH}; in brackets: recovered"
    figure.suptitle(title, size=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    ending = "" if name == "language model" else f"_{name}"
    figure.savefig(RESULTS / f"qat_quality{ending}.svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
