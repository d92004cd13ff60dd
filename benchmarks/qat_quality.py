"""How much of the quality lost to quantization comes back in a few steps of training: recoup next to torchao.

    .venv/bin/python benchmarks/qat_quality.py              all of it, about an hour and a half on two cores
    .venv/bin/python benchmarks/qat_quality.py --formats int4 --steps 40

SmolLM2-135M on State-of-the-Union addresses, test speeches from later years than training ones. Every cell
of the table is a process of its own (`qat_quality_job.py`): perplexity of float, round-to-nearest and
trained, 40 steps of 2 x 256 tokens. The control is the float model trained in the same way, so that getting
used to the text is not taken for recovery:

    recovered = 1 - (trained - float trained) / (round-to-nearest - float)

torchao runs in an environment of its own that this script makes. A cell that is measured already is not
measured again: remove results/qat_quality.json, or the cell in it, to repeat it.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from cells import RESULTS, SCRATCH, Job, measured, python_of

FORMATS = ("int4", "int3", "int2", "mxfp4", "nvfp4")
TOOLS = ("recoup", "torchao")
TRAIN_WINDOW, TEST_WINDOW, TEST_WINDOWS = 256, 512, 24
LOOKS = {
    "int4": "int4 g32 weights, int8 dynamic inputs",
    "int3": "int3 g32 weights",
    "int2": "int2 g32 weights",
    "mxfp4": "MXFP4 weights and inputs",
    "nvfp4": "NVFP4 weights and inputs",
}
# The same for every format: the rungs gptq and qat of a recipe with these keys, on the training text alone.
# Channels are balanced where inputs are quantized, too; weights alone fare better without (int2: 464 to 702).
RECOUP: dict[str, Any] = {
    "recipe": {"weight_ranges": "learned"},
    "settings": {"loss": {"task": 0.8, "logits-kl": 0.2}, "scale_learning_rate": 2e-4},
    "gptq samples": 80,
}
SMOOTH = ("int4", "mxfp4", "nvfp4")
# glibc would hand the memory of every large tensor back to the kernel, and pay for its pages again.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args()

    model, tokens = prepare(SCRATCH, asked.steps)
    pythons = {"recoup": sys.executable, "float": sys.executable}
    if "torchao" in asked.tools:
        pythons["torchao"] = python_of("torchao")
    jobs: dict[str, tuple[str, Job]] = {}
    for tool, format_ in [("float", "float32"), *((t, f) for f in asked.formats for t in asked.tools)]:
        name = f"{tool} {format_}, {asked.steps} steps, learning rate {asked.learning_rate:g}"
        jobs[name] = (
            pythons[tool],
            {
                "tool": tool,
                "format": format_,
                "steps": asked.steps,
                "learning_rate": asked.learning_rate,
                "threads": asked.threads,
                "model": str(model),
                "tokens": str(tokens),
                **({**RECOUP, "smooth": format_ in SMOOTH} if tool == "recoup" else {}),
            },
        )
    cells = measured(
        RESULTS / "qat_quality.json",
        "qat_quality_job.py",
        jobs,
        threads=asked.threads,
        environment=KEEP_MEMORY,
    )
    table = recovered(cells, asked.steps, asked.learning_rate)
    print(as_text(table))
    draw(table, RESULTS / "qat_quality.svg", f"{asked.steps} steps of 2 x 256 tokens")


def prepare(work: Path, steps: int) -> tuple[Path, Path]:
    """The model's folder and the tokens, made once: train (blocks, 2, 256), test (24, 512)."""
    from transformers import AutoTokenizer

    from recoup.tasks.assets import fetch

    model, text = fetch("smollm2-135m"), fetch("sotu")
    tokens = work / f"tokens-{steps}.npz"
    if not tokens.is_file():
        tokenizer = AutoTokenizer.from_pretrained(model)

        def packed(part: str, window: int) -> np.ndarray:
            speeches = [json.loads(line)["text"] for line in (text / f"{part}.jsonl").open(encoding="utf-8")]
            ids = [
                i for speech in speeches for i in [*tokenizer(speech)["input_ids"], tokenizer.eos_token_id]
            ]
            return np.array(ids[: len(ids) // window * window]).reshape(-1, window)

        train, test = packed("train", TRAIN_WINDOW), packed("test", TEST_WINDOW)
        chosen = np.random.default_rng(0).permutation(len(train))[: 2 * steps]
        spread = np.linspace(0, len(test) - 1, TEST_WINDOWS).astype(int)
        work.mkdir(exist_ok=True)
        np.savez(tokens, train=train[chosen].reshape(steps, 2, -1), test=test[spread])
    return model, tokens


def recovered(cells: dict[str, Any], steps: int, learning_rate: float) -> list[dict[str, Any]]:
    """One row for each format and tool; `recovered` is 1 where training leaves nothing of the loss."""
    ending = f", {steps} steps, learning rate {learning_rate:g}"
    control = cells[f"float float32{ending}"]
    rows: list[dict[str, Any]] = []
    for format_ in FORMATS:
        for tool in TOOLS:
            cell = cells.get(f"{tool} {format_}{ending}")
            if cell is None:
                continue
            row = {"format": format_, "tool": tool, **cell}
            row |= {"float": control["float"], "float trained": control["trained"]}
            if "trained" in cell:
                lost = cell["round-to-nearest"] - control["float"]
                row["recovered"] = 1 - (cell["trained"] - control["trained"]) / lost
            rows.append(row)
    return rows


def as_text(rows: list[dict[str, Any]]) -> str:
    """The table as Markdown."""
    lines = [
        f"float {rows[0]['float']:.2f}, float trained in the same way {rows[0]['float trained']:.2f}",
        "",
        "| format | tool | round-to-nearest | trained | recovered | training, CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [LOOKS[row["format"]], row["tool"]]
        if "trained" in row:
            cells += [f"{row['round-to-nearest']:,.4g}", f"{row['trained']:,.4g}"]
            cells += [f"{row['recovered']:.0%}", f"{row['trained cpu seconds']:.0f}"]
        else:
            cells += [f"fails: {row['error'][:80]}", "", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], file: Path, title: str) -> None:
    """Perplexity by format, on a logarithmic axis: where each tool starts and where it ends."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.fonttype"] = "none"
    import matplotlib.pyplot as plt

    colours = {"recoup": "#0b6e4f", "torchao": "#b5543c"}
    formats = [format_ for format_ in FORMATS if any(row["format"] == format_ for row in rows)]
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
            f"{end:,.4g}  ({row['recovered']:.0%})", (end, y), (6, 6), textcoords="offset points", size=8
        )
    axes.axvline(rows[0]["float"], color="#777", lw=1, ls=":")
    axes.axvline(rows[0]["float trained"], color="#222", lw=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(formats)), [LOOKS[format_] for format_ in formats])
    axes.set_ylim(len(formats) - 0.5, -0.5)
    axes.set_xlabel("perplexity, lower is better; line: float trained in the same way, dotted: float")
    handles = [
        plt.Line2D([], [], color=c, marker="o", label=f"{tool}, trained") for tool, c in colours.items()
    ]
    handles.append(plt.Line2D([], [], color="#777", marker="o", mfc="white", ls="", label="round-to-nearest"))
    axes.legend(handles=handles, fontsize=8, frameon=False, loc="lower right")
    axes.set_title(f"SmolLM2-135M, {title}; in brackets: recovered", size=10, loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
