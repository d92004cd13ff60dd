"""One run on one page: what was asked, what came out, how sure that is, and what it costs.

`html` is a single file that opens offline: no script, no font, no picture of another place. `markdown`
says the same in text. Both begin with the outcome, and neither hides a bad one: a file that is slower
than the float one is called slower.
"""

import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from markupsafe import Markup

from recoup.validate.gates import Verdict
from recoup.validate.symptoms import Symptom
from recoup.validate.tries import Retuned

_NOTICED = 1.02  # a ratio of latencies nearer to 1 is none
_ROWS = 20  # of a table that is to be read


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One attempt, measured: a rung of the ladder, or the exported file read back.

    Args:
        name: as in "rtn", "mse", "qat".
        metrics: metric -> aggregate.
        verdicts: one for each gate.
        seconds: what the attempt took.
        outcome: "passed", "failed" or "undecided".
    """

    name: str
    metrics: dict[str, float]
    verdicts: list[Verdict]
    seconds: float
    outcome: str


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a file costs to keep and to run.

    Args:
        bytes: size on disk.
        seconds: median latency of one batch; None where the engine here says nothing about it.
        peak_bytes: peak memory while running it; None likewise.
        batch: what a batch was, as in "8 x 64 tokens".
        unmeasured: why there are no seconds and bytes, and where they can be had.

    >>> print(Cost(bytes=93_100_000, seconds=0.0123, peak_bytes=131_000_000, batch="8 x 64"))
    93.1 MB, 12.3 ms for 8 x 64, peak 131 MB
    """

    bytes: int
    seconds: float | None
    peak_bytes: int | None
    batch: str
    unmeasured: str = ""

    def __str__(self) -> str:
        if self.seconds is None or self.peak_bytes is None:
            return f"{size(self.bytes)}; speed and memory not measured: {self.unmeasured}"
        return f"{size(self.bytes)}, {duration(self.seconds)} for {self.batch}, peak {size(self.peak_bytes)}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything a reader is shown.

    Args:
        title: the model, in the reader's words.
        scheme: the preset or recipe that was asked for.
        target: the engine or file format.
        outcome: "passed", "failed" or "undecided", of the whole run.
        rung: the rung that was exported; None if none was.
        baseline: metric -> aggregate of the float model.
        rungs: the attempts, in the order in which they were made.
        artefact: the exported file, measured again after reading it back; None if nothing was exported.
        float_cost, artefact_cost: of both files, in one engine and interleaved.
        curve: one entry per logged training step: step, loss, and optionally held_out, learning_rate.
        symptoms: what training showed of its quantizers.
        layer_errors: rung -> module -> relative output error.
        notes: sentences for the reader: what was kept and why, what gave no speed.
        facts: versions, seeds, hashes, machine.
        retuned: what re-tuning tried; None where the recipe gives it no time.
    """

    title: str
    scheme: str
    target: str
    outcome: str
    rung: str | None
    baseline: dict[str, float]
    rungs: list[Rung]
    artefact: Rung | None
    float_cost: Cost | None
    artefact_cost: Cost | None
    curve: list[dict[str, float]]
    symptoms: list[Symptom]
    layer_errors: dict[str, dict[str, float]]
    notes: list[str]
    facts: dict[str, str]
    retuned: Retuned | None = None


def html(report: Report) -> str:
    """The report as one page that needs nothing else."""
    from recoup.validate import plots

    pictures = {
        "curve": plots.training_curve(report.curve),
        "layers": plots.layer_errors(report.layer_errors),
        "trade": _trade(report),
    }
    return _render("report.html.jinja", report, {name: svg and Markup(svg) for name, svg in pictures.items()})


def markdown(report: Report) -> str:
    """The report as text, for a pull request or a terminal."""
    return _render("report.md.jinja", report, {})


def write(report: Report, folder: str | os.PathLike[str]) -> None:
    """Write report.md and report.html into the folder; each is there whole, or not at all."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, text in (("report.md", markdown(report)), ("report.html", html(report))):
        descriptor, draft = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(draft, 0o644)  # a temporary file is its owner's alone
            os.replace(draft, Path(folder) / name)
        finally:
            Path(draft).unlink(missing_ok=True)


def headline(report: Report) -> str:
    """The outcome in one sentence."""
    attempts = ", ".join(rung.name for rung in report.rungs) or "none"
    if report.outcome == "passed":
        exported = report.artefact is not None and report.artefact.outcome == "passed"
        file = ", and so does the exported file" if exported else ""
        return f"{report.rung} keeps every gate within its limit{file}."
    if report.artefact and report.artefact.outcome == report.outcome == "failed":
        return f"{report.rung} passed, but the exported file does not: do not ship it."
    if report.outcome == "undecided":
        rung = next((r for r in reversed(_measured(report)) if r.outcome == "undecided"), None)
        open_ = [v for v in rung.verdicts if v.outcome == "undecided"] if rung else []
        if rung is None or not open_:
            return "No gate could be decided."
        hardest = max(open_, key=lambda verdict: verdict.more_samples or 0)
        return f"It is not certain that {rung.name} keeps its limits ({hardest.gate}): {hardest.reason}."
    return f"No rung keeps every gate within its limit (tried: {attempts}): do not quantize it this way."


def latencies(costs: tuple[Cost, Cost] | None) -> tuple[float, float]:
    """Of the float file and of the other one, in seconds; infinite where nobody knows."""
    before, after = (cost.seconds for cost in costs) if costs else (None, None)
    return (math.inf, math.inf) if before is None or after is None else (before, after)


def is_slower(costs: tuple[Cost, Cost] | None) -> bool:
    """Is the second file slower than the float one, as far as anybody knows?"""
    before, after = latencies(costs)
    return after > _NOTICED * before


def speed(report: Report) -> str | None:
    """How the artefact's latency compares with the float file's, in one plain sentence."""
    if report.float_cost is None or report.artefact_cost is None:
        return None
    if report.artefact_cost.seconds is None or report.float_cost.seconds is None:
        return f"Speed and memory were not measured: {report.artefact_cost.unmeasured}."
    ratio = report.artefact_cost.seconds / report.float_cost.seconds
    if ratio > _NOTICED:
        return f"The exported file is SLOWER than the float file: {ratio:.2f} times the time for each batch."
    if ratio > 0.98:
        return "The exported file is as fast as the float file, no faster."
    return f"The exported file is {1 / ratio:.2f} times as fast as the float file."


def _measured(report: Report) -> list[Rung]:
    return [*report.rungs, *([report.artefact] if report.artefact else [])]


def _trade(report: Report) -> str | None:
    from recoup.validate import plots

    floats, artefacts, artefact = report.float_cost, report.artefact_cost, report.artefact
    if floats is None or artefacts is None or artefact is None:
        return None
    whole = [v for v in artefact.verdicts if v.slice is None]
    metric = next((v.metric for v in whole), next(iter(report.baseline), None))
    if metric is None or metric not in artefact.metrics or metric not in report.baseline:
        return None
    limit = next((v.baseline + (v.limit if v.direction == "increase" else -v.limit) for v in whole), None)
    axes = {"size, MB": (floats.bytes / 1e6, artefacts.bytes / 1e6)}
    if floats.seconds is not None and artefacts.seconds is not None:
        axes["median latency of a batch, ms"] = (1e3 * floats.seconds, 1e3 * artefacts.seconds)
    better = {"increase": ", lower is better", "decrease": ", higher is better"}
    return plots.trade(
        metric + (better[whole[0].direction] if whole else ""),
        {"float": report.baseline[metric], "artefact": artefact.metrics[metric]},
        {rung.name: rung.metrics[metric] for rung in report.rungs if metric in rung.metrics},
        axes,
        limit,
    )


def interval_picture(verdict: Verdict) -> Markup | None:
    """The interval against the limit: 0 and the limit are at the same places in every row, worse is right.

    None where there is no interval.
    """
    if verdict.lo is None or verdict.hi is None:
        return None
    sign = 1 if verdict.direction == "increase" else -1
    best, change, worst = sorted(sign * x for x in (verdict.lo, verdict.change, verdict.hi))
    unit = verdict.limit or max(abs(best), abs(worst)) or 1.0

    def x(amount: float) -> float:
        return round(min(max(60 + 60 * amount / unit, 8), 192), 1)

    clipped = "".join(
        f'<path class="tip {verdict.outcome}" d="M{end} 6 l{7 * way} 5 l{-7 * way} 5 z"/>'
        for end, way, beyond in ((192, 1, x(worst) == 192), (8, -1, x(best) == 8))
        if beyond
    )
    limit = f'<path class="limit" d="M{x(verdict.limit)} 1 v20"/>'
    dot = f'<circle class="dot {verdict.outcome}" cx="{x(change)}" cy="11" r="4"/>'
    return Markup(
        f'<svg class="interval" viewBox="0 0 200 22" role="img" aria-label="interval against the limit">'
        f'<rect class="allowed" x="0" y="1" width="{x(verdict.limit)}" height="20"/>'
        f'<path class="zero" d="M60 1 v20"/>{limit}'
        f'<path class="bar {verdict.outcome}" d="M{x(best)} 11 H{x(worst)}"/>{clipped}'
        f"{dot if 8 < x(change) < 192 else ''}</svg>"
    )


def figure(value: float | None) -> str:
    """A number for a reader: four significant digits."""
    return "–" if value is None else f"{value:.4g}"  # noqa: RUF001


def size(count: float) -> str:
    """Bytes in decimal units, as in "12.3 MB"."""
    unit = min(int(math.log10(max(float(f"{count:.3g}"), 1)) // 3), 4)
    return f"{count / 1000**unit:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[unit]}"


def duration(seconds: float) -> str:
    """As in "3.1 ms", "4.2 s", "12 min"."""
    if seconds < 0.9995:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def _cell(value: object) -> Markup:
    """Text that cannot leave its cell of a Markdown table."""
    escaped = Markup.escape(" ".join(str(value).split()))
    return Markup(escaped.replace("|", "\\|").replace("`", "&#96;"))


def _render(template: str, report: Report, pictures: dict[str, Any]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    page = Environment(
        loader=PackageLoader("recoup.validate", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {
        "figure": figure,
        "size": size,
        "duration": duration,
        "cell": _cell,
        "interval": interval_picture,
    }
    page.filters.update(cast(Any, filters))  # jinja2 types the table by the filters it comes with
    return page.get_template(template).render(
        report=report,
        measured=_measured(report),
        headline=headline(report),
        speed=speed(report),
        shown=report.symptoms[:_ROWS],
        **pictures,
    )
