"""What fake quantization adds to a training step, in time and in memory: recoup next to its peers.

    .venv/bin/python benchmarks/step_overhead.py                  all of it, an hour on two quiet cores
    .venv/bin/python benchmarks/step_overhead.py --quick          two pairs of one form and two layers
    .venv/bin/python benchmarks/step_overhead.py --device cuda    4096-wide layers in bfloat16 on a GPU

SmolLM2-135M in float32, every Linear layer but the head quantized: forward, backward, AdamW, `zero_grad`. A
cell is a process of its own (`step_overhead_job.py`), in an environment that holds one tool and nothing of
the others:

    step     a float and a quantized model of the same weights take turns; the median of the ratios of
             neighbouring steps, in CPU seconds of all threads and on the clock
    memory   the most that a process holds during the first three steps of one model
    import   of the library, after torch
    kernel   on a GPU: fake quantization against a copy of the same bytes

A cell that is measured already is not measured again: remove it from the results to repeat it.
"""

import argparse
import os
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cells import HERE, RESULTS, SCRATCH, Job, measured, python_of

# A tool: its environment, and what the job is told.
TOOLS: dict[str, tuple[str, Job]] = {
    "float": ("recoup", {"tool": "float"}),
    "recoup-reference": ("recoup", {"tool": "recoup", "impl": "reference"}),
    "recoup-fused": ("recoup", {"tool": "recoup", "impl": "fused"}),
    "recoup-compiled": ("recoup", {"tool": "recoup", "impl": "compiled"}),
    "torchao": ("torchao", {"tool": "torchao"}),
    "modelopt": ("modelopt", {"tool": "modelopt"}),
    "brevitas": ("brevitas", {"tool": "brevitas"}),
}
FORMS = {
    "w4": "int4 g32 weights",
    "w4a8": "int4 g32 weights, int8 dynamic inputs",
    "nvfp4": "NVFP4 weights and inputs",
}
SIZES = {"cpu": [(2, 256), (8, 256)], "cuda": [(8, 2048)]}
IMPORTS, IMPORT_GOAL = 5, 1.0
# Of a step over the float step, by form and by rows of the batch; of the peak over the float step's.
STEP_GOALS = {
    "cpu": {("w4", 2): 1.06, ("w4", 8): 1.03, ("w4a8", 2): 1.10, ("w4a8", 8): 1.07},
    "cuda": {("w4", 8): 1.05, ("w4a8", 8): 1.05, ("nvfp4", 8): 1.05},
}
MEMORY_GOALS = {"cpu": {"w4": 3.3 / 3.23, "w4a8": 3.2 / 3.23}, "cuda": {}}
CLOCK = {"cpu": "cpu", "cuda": "wall"}
COLOURS = {
    "recoup-reference": "#7fb8a4",
    "recoup-fused": "#3f937a",
    "recoup-compiled": "#0b6e4f",
    "torchao": "#b5543c",
    "modelopt": "#c98f3c",
    "brevitas": "#7a6a8a",
}
GOAL = "#d11"
# The height of the bar of each form and tool.
Places = dict[tuple[str, str], float]
BEGIN, END = "<!-- written by step_overhead.py -->\n", "<!-- as far as here -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--pairs", type=int, default=7, help="of steps; half as many of the large batch")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", choices=SIZES, default="cpu")
    parser.add_argument("--quick", action="store_true", help="two pairs of one form and two layers")
    asked = parser.parse_args()

    name = "step_overhead" if asked.device == "cpu" else f"step_overhead_{asked.device}"
    folder = SCRATCH if asked.quick else RESULTS
    file = folder / f"{name}.json"
    cells = measured(file, "step_overhead_job.py", dict(jobs(asked)), threads=asked.threads)
    table = as_text(cells, asked.device)
    print(table)
    draw(cells, asked.device, file.with_suffix(".svg"))
    if file == RESULTS / "step_overhead.json":
        publish(table, HERE / "README.md")


def jobs(asked: argparse.Namespace) -> Iterator[tuple[str, tuple[str, Job]]]:
    """Every cell that was asked for: its name, and who measures it."""
    from recoup.tasks.assets import fetch

    forms, sizes = asked.forms, SIZES[asked.device]
    common: Job = {"device": asked.device, "threads": asked.threads, "pairs": asked.pairs, "warm-up": 2}
    if asked.device == "cpu":
        common["model"] = str(fetch("smollm2-135m"))
    if asked.quick:
        forms, sizes = forms[:1], sizes[:1]
        common |= {"pairs": 2, "warm-up": 1, "layers": 2}
    for rows, window in sizes:
        size = {"rows": rows, "window": window}
        for form in ["float32", *forms]:
            goal = STEP_GOALS[asked.device].get((form, rows))
            if goal is None and form != "float32" and (rows, window) != sizes[0]:
                continue
            for tool, (peer, told) in TOOLS.items():
                if tool in asked.tools and (tool == "float") == (form == "float32"):
                    pairs = common["pairs"] if (rows, window) == sizes[0] else (common["pairs"] + 1) // 2
                    job = common | told | size | {"form": form, "pairs": pairs}
                    kinds = ["step", "memory"] if (rows, window) == sizes[0] else ["step"]
                    if asked.device == "cuda" and told["tool"] == "recoup":
                        kinds.append("kernel")
                    for kind in kinds:
                        yield cell(kind, tool, form, rows), (python_of(peer), job | {"measure": kind})
    for run in range(IMPORTS if asked.device == "cpu" else 0):
        for peer in dict.fromkeys(TOOLS[tool][0] for tool in asked.tools if tool != "float"):
            yield f"import {peer}, {run}", (python_of(peer), common | {"tool": peer, "measure": "import"})


def cell(kind: str, tool: str, form: str, rows: int) -> str:
    return f"{kind} {tool} {form}, {rows} rows"


def as_text(cells: dict[str, Any], device: str) -> str:
    """The tables as Markdown."""
    sizes, clock = SIZES[device], CLOCK[device]
    heads = [f"{rows} x {window}, {what}" for rows, window in sizes for what in ("CPU", "wall")]
    lines = [
        _row(["form", "tool", *heads, "peak memory, GiB (over float)"]),
        _row(["---", "---", *["--:"] * (len(heads) + 1)]),
    ]
    for form, looks in {"float32": "float32, next to itself", **FORMS}.items():
        rows_of_form: list[str] = []
        for tool in TOOLS:
            found = [cells.get(cell("step", tool, form, rows)) for rows, _ in sizes]
            if not any(found):
                continue
            ratios = [_ratio(step, what) for step in found for what in ("cpu", "wall")]
            error = next((step["error"] for step in found if step and "error" in step), None)
            if error:
                ratios = [f"fails: {error[:90]}", *[""] * (len(heads) - 1)]
            rows_of_form.append(_row([looks, tool, *ratios, _peak(cells, tool, form, sizes[0][0])]))
        goals = [STEP_GOALS[device].get((form, rows)) for rows, _ in sizes]
        if rows_of_form and any(goals):
            shown = [f"**{goal:.2f}**" if what == clock else "" for goal in goals for what in ("cpu", "wall")]
            memory = MEMORY_GOALS[device].get(form)
            rows_of_form.append(_row([looks, "**goal**", *shown, f"**({memory:.2f})**" if memory else ""]))
        lines += rows_of_form
    kernels = [
        f"| {name} | {what} | {share:.0%} |"
        for name, found in cells.items()
        if name.startswith("kernel")
        for what, share in found.items()
        if what.endswith("copy bandwidth")
    ]
    if kernels:
        lines += ["", "| kernel | of | goal: 85% |", "|---|---|--:|", *kernels]
    if imports := imported(cells):
        lines += ["", f"| import, seconds after torch's (goal: {IMPORT_GOAL:.0f}) | median of {IMPORTS} |"]
        lines += ["|---|--:|", *(f"| {peer} | {seconds:.1f} |" for peer, seconds in imports.items())]
    return "\n".join(lines)


def imported(cells: dict[str, Any]) -> dict[str, float]:
    """Seconds on the clock that each library's import takes."""
    seen: dict[str, list[float]] = {}
    for name, found in cells.items():
        if (peer := re.fullmatch(r"import (\w+), \d+", name)) and "wall" in found:
            seen.setdefault(peer[1], []).append(found["wall"])
    return {peer: statistics.median(seconds) for peer, seconds in seen.items()}


def _row(texts: list[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _ratio(found: Job | None, clock: str) -> str:
    return f"{found[clock]['ratio']:.3f}" if found and clock in found else ""


def _peak(cells: dict[str, Any], tool: str, form: str, rows: int) -> str:
    peak, unquantized = peak_of(cells, tool, form, rows), peak_of(cells, "float", "float32", rows)
    over = f" ({peak / unquantized:.2f})" if peak and unquantized else ""
    return f"{peak:.2f}{over}" if peak else ""


def peak_of(cells: dict[str, Any], tool: str, form: str, rows: int) -> float | None:
    """In GiB; None where it was not measured."""
    found = cells.get(cell("memory", tool, form, rows), {})
    return found["peak bytes"] / 2**30 if "peak bytes" in found else None


def publish(table: str, readme: Path) -> None:
    """Put the tables where the README shows them, with the plot below."""
    shown = f"{table}\n\n![A step over the float step, and the peak of memory](results/step_overhead.svg)"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        sys.exit(f"{readme.name}: the lines {BEGIN.strip()} and {END} are not there; put them back")
    readme.write_text(f"{before}{BEGIN}\n{shown}\n\n{END}{after}", encoding="utf-8")


def draw(cells: dict[str, Any], device: str, file: Path) -> None:
    """Bars of each tool by form: what a step costs over the float step, and the peak of its memory."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.fonttype"] = "none"
    import matplotlib.pyplot as plt

    sizes, places = SIZES[device], _places(cells, device)
    bottom, columns = max(places.values(), default=0.0), len(sizes) + 1
    figure, panels = plt.subplots(
        1, columns, sharey=True, figsize=(3.2 * columns + 1.2, 0.26 * bottom + 1.8), layout="constrained"
    )
    for axes, (rows, window) in zip(panels, sizes, strict=False):
        axes.set_title(f"step, {rows} x {window} tokens", size=9, loc="left")
        _steps(axes, cells, places, device, rows)
    rows, window = sizes[0]
    panels[-1].set_title(f"peak memory, {rows} x {window} tokens", size=9, loc="left")
    _peaks(panels[-1], cells, places, device, rows)
    forms = {form: [y for (of, _), y in places.items() if of == form] for form, _ in places}
    names = [FORMS[form].replace(", ", ",\n") for form in forms]
    panels[0].set_yticks([statistics.mean(ys) for ys in forms.values()], names)
    panels[0].set_ylim(bottom + 0.8, -0.8)
    for axes in panels:
        axes.margins(x=0.18)
        axes.tick_params(labelsize=8)
        axes.tick_params(axis="y", length=0)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
    shown = [tool for tool in COLOURS if any(of == tool for _, of in places)]
    handles = [plt.Line2D([], [], color=COLOURS[tool], lw=5, label=tool) for tool in shown]
    handles.append(plt.Line2D([], [], color=GOAL, lw=1.5, label="goal"))
    figure.legend(handles=handles, fontsize=8, frameon=False, loc="outside lower center", ncols=len(handles))
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def _places(cells: dict[str, Any], device: str) -> Places:
    """Bars below each other, with a gap between forms."""
    places: Places = {}
    for form in FORMS:
        gap = 1.6 if places else 0
        for tool in COLOURS:
            if any(cell("step", tool, form, rows) in cells for rows, _ in SIZES[device]):
                places[form, tool] = max(places.values(), default=0.0) + gap
                gap = 1.0
    return places


def _steps(axes: Any, cells: dict[str, Any], places: Places, device: str, rows: int) -> None:
    clock = CLOCK[device]
    axes.axvline(1, color="#222", lw=1)
    axes.set_xlabel(f"{'CPU' if device == 'cpu' else 'GPU'} time over the float step, and quartiles", size=8)
    for (form, tool), y in places.items():
        found = cells.get(cell("step", tool, form, rows), {})
        if clock in found:
            ratio, ratios = found[clock]["ratio"], sorted(found[clock]["ratios"])
            quartiles = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
            axes.barh(y, ratio - 1, left=1, color=COLOURS[tool], height=0.8)
            axes.plot(quartiles, [y, y], color="#222", lw=0.8)
            _label(axes, max(ratio, quartiles[1], 1.0), y, f"{ratio:.2f}")
        else:
            _label(axes, 1.0, y, "fails" if "error" in found else "not measured", COLOURS[tool])
    _goals(axes, places, {form: goal for (form, of), goal in STEP_GOALS[device].items() if of == rows})


def _peaks(axes: Any, cells: dict[str, Any], places: Places, device: str, rows: int) -> None:
    axes.set_xlabel("GiB; line: the float step", size=8)
    for (form, tool), y in places.items():
        if peak := peak_of(cells, tool, form, rows):
            axes.barh(y, peak, color=COLOURS[tool], height=0.8)
            _label(axes, peak, y, f"{peak:.2f}")
    if unquantized := peak_of(cells, "float", "float32", rows):
        axes.axvline(unquantized, color="#222", lw=1)
        _goals(axes, places, {form: goal * unquantized for form, goal in MEMORY_GOALS[device].items()})


def _label(axes: Any, x: float, y: float, text: str, colour: str = "#222") -> None:
    axes.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center", size=8, color=colour)


def _goals(axes: Any, places: Places, goals: dict[str, float]) -> None:
    for form, goal in goals.items():
        if heights := [y for (of, _), y in places.items() if of == form]:
            axes.plot([goal, goal], [min(heights) - 0.5, max(heights) + 0.5], color=GOAL, lw=1.5)


if __name__ == "__main__":
    main()
