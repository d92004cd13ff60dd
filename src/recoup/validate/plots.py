"""The pictures of a report, as SVG text that is put into its page.

Colours are CSS variables of the page, so that a picture follows light, dark and print; text stays text
in the page's own font. Ids carry the name of the picture, as one page holds several of them. The same
data gives the same bytes. A picture of nothing is None: the page then says so in a sentence.
"""

import io
import math
import re
from collections.abc import Sequence
from html import escape
from itertools import cycle, takewhile
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Stand-ins that matplotlib can parse -> the page's variables.
_COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--series-1)",
    "#050505": "var(--series-2)",
    "#060606": "var(--series-3)",
    "#070707": "var(--series-4)",
    "#080808": "var(--good)",
    "#090909": "var(--surface)",
}
_INK, _MUTED, _LINE, *_SERIES, _GOOD, _SURFACE = _COLOURS
_MARKERS = "oDs^"
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "recoup",
    "text.parse_math": False,  # names may hold a dollar sign
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "figure.facecolor": "none",
}


def training_curve(curve: Sequence[dict[str, float]]) -> str | None:
    """Loss on the training batches and, where measured, held out; the learning rate below it.

    Args:
        curve: one entry per logged step: step, loss, and optionally held_out and learning_rate.
    """
    if len(curve) < 2:
        return None
    with _Picture(8.8, 3.8) as page:
        rates = _series(curve, "learning_rate")
        top, *below = page.figure.subplots(
            2 if rates[0] else 1, 1, sharex=True, squeeze=False, height_ratios=[3.2, 1] if rates[0] else [1]
        )[:, 0]
        held_out = _series(curve, "held_out")
        top.plot(*_series(curve, "loss"), color=_SERIES[0], linewidth=1.3, label="training loss")
        if held_out[0]:
            top.plot(*held_out, color=_SERIES[1], linewidth=1.6, marker="o", markersize=3.5, label="held out")
        top.set_ylabel("loss")
        top.legend(loc="upper right", ncols=2)
        for axes in below:
            axes.plot(*rates, color=_MUTED, linewidth=1.1)
            axes.set_ylabel("learning rate")
            axes.set_ylim(bottom=0)
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
        (below or [top])[-1].set_xlabel("step")
        page.figure.align_ylabels()
        return page.svg("training", "Training curve: loss by step")


def layer_errors(errors: dict[str, dict[str, float]]) -> str | None:
    """Relative output error of every module, in model order, one mark per rung, on a log axis.

    Args:
        errors: rung -> module -> |quantized output - float output| / |float output|.
    """
    modules = list(dict.fromkeys(module for rung in errors.values() for module in rung))
    if not modules:
        return None
    prefix = _common_prefix(modules)
    with _Picture(8.8, 0.9 + 0.165 * len(modules)) as page:
        axes = page.figure.subplots()
        rows = {module: row for row, module in enumerate(modules)}
        for number, (rung, by_module) in enumerate(errors.items()):
            points = [(e, rows[m]) for m, e in by_module.items() if _positive(e)]
            axes.plot(
                *(zip(*points, strict=True) if points else ([], [])),
                linestyle="none",
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=4.2,
                color=_SERIES[number % len(_SERIES)],
                label=rung,
            )
        found = {row: [e[m] for e in errors.values() if _positive(e.get(m, 0.0))] for m, row in rows.items()}
        spans = [(row, min(values), max(values)) for row, values in found.items() if values]
        if spans:  # from the best rung to the worst
            axes.hlines(*zip(*spans, strict=True), color=_LINE, linewidth=1.6, zorder=1)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:g} %")
        axes.xaxis.set_minor_formatter(lambda x, _: f"{100 * x:g} %" if _leads_with(x, (2, 5)) else "")
        axes.tick_params(axis="x", which="both", top=False, labeltop=len(modules) > 30)
        axes.set_yticks(range(len(modules)), [m.removeprefix(prefix) for m in modules], fontsize=7.5)
        axes.grid(axis="y", linewidth=0.3)
        axes.grid(axis="x", which="both", linewidth=0.3)
        axes.set_ylim(len(modules) - 0.4, -0.6)
        axes.set_xlabel("relative output error" + (f", modules below {prefix.rstrip('.')}" if prefix else ""))
        page.figure.legend(loc="outside upper right", ncols=len(errors))
        return page.svg("layers", f"Relative output error of {len(modules)} modules")


def trade(
    metric: str,
    quality: dict[str, float],
    rungs: dict[str, float],
    axes_of: dict[str, tuple[float, float]],
    limit: float | None,
) -> str | None:
    """Quality against cost: the float file and the artefact, with the rungs as ticks at the artefact.

    Args:
        metric: what the vertical axis shows.
        quality: its value for "float" and "artefact", measured on files.
        rungs: its value after each rung, before any export.
        axes_of: what a horizontal axis shows -> its value for the float file and the artefact.
        limit: the worst value that is allowed, if a gate limits this metric.
    """
    values = [*quality.values(), *rungs.values()]
    if not axes_of or not all(map(math.isfinite, quality.values())):
        return None
    with _Picture(8.8, 3.3) as page:
        row = page.figure.subplots(1, len(axes_of), sharey=True, squeeze=False)[0]
        shown = [v for v in values if math.isfinite(v)] + ([] if limit is None else [limit])
        pad = 0.12 * (max(shown) - min(shown)) or 0.01 * abs(shown[0]) or 1.0
        for axes, (label, (float_x, artefact_x)) in zip(row, axes_of.items(), strict=True):
            widest = max(float_x, artefact_x)
            axes.set_xlim(0, 1.4 * widest)
            axes.set_ylim(min(shown) - pad, max(shown) + 1.6 * pad)
            if limit is not None:
                axes.axhline(limit, color=_GOOD, linewidth=1, linestyle=(0, (4, 3)))
                axes.annotate(
                    "limit", (0, limit), (4, 3), textcoords="offset points", color=_GOOD, fontsize=8
                )
            finite = {name: value for name, value in rungs.items() if math.isfinite(value)}
            for colour, value in zip(cycle(_SERIES), finite.values(), strict=False):
                axes.plot(artefact_x, value, marker="_", markersize=17, markeredgewidth=2, color=colour)
            for name, x in (("float", float_x), ("artefact", artefact_x)):
                axes.plot(x, quality[name], marker="o", markersize=8, color=_INK, markeredgecolor=_SURFACE)
            _label(axes, artefact_x, finite | {"exported file": quality["artefact"]}, 12)
            _label(axes, float_x, {"float": quality["float"]}, 8)
            axes.set_xlabel(label)
        row[0].set_ylabel(metric)
        return page.svg(
            "trade", f"{metric} against {' and '.join(axis.partition(',')[0] for axis in axes_of)}"
        )


def _label(axes: "Axes", x: float, points: dict[str, float], height: float) -> None:
    """Names to the right of points at one x, moved apart so that none covers another."""
    lo, hi = axes.get_ylim()
    gap = height * (hi - lo) / 150  # the axes are about 150 points high
    at = -math.inf
    for name, y in sorted(points.items(), key=lambda point: point[1]):
        at = max(y, at + gap)
        axes.annotate(
            name,
            (x, y),
            (13, (at - y) * 150 / (hi - lo)),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )


def _series(curve: Sequence[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    points = [(entry["step"], entry[name]) for entry in curve if name in entry]
    return [step for step, _ in points], [value for _, value in points]


def _common_prefix(modules: list[str]) -> str:
    """The leading path that all names share, with its dot; "" for a single module."""
    if len(modules) < 2:
        return ""
    paths = [module.split(".")[:-1] for module in modules]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return "".join(f"{parts[0]}." for parts in shared)


def _positive(error: float) -> bool:
    """It has a place on a log axis."""
    return math.isfinite(error) and error > 0


def _leads_with(x: float, digits: tuple[int, ...]) -> bool:
    return round(x / 10 ** math.floor(math.log10(x))) in digits if x > 0 else False


class _Picture:
    """A figure in the report's style, closed into SVG text."""

    figure: "Figure"

    def __init__(self, width: float, height: float) -> None:
        self._size = (width, height)

    def __enter__(self) -> "_Picture":
        import matplotlib as mpl
        from matplotlib.figure import Figure

        self._context = mpl.rc_context(cast(Any, _STYLE))  # its keys are typed as literals
        self._context.__enter__()
        self.figure = Figure(figsize=self._size, layout="constrained")
        return self

    def __exit__(self, *exception: object) -> None:
        self._context.__exit__(None, None, None)

    def svg(self, name: str, title: str) -> str:
        """The picture as an <svg> element for an HTML page.

        Args:
            name: prefix of its ids, unique in the page.
            title: what a screen reader says; no markup.
        """
        text = io.StringIO()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        self.figure.savefig(text, format="svg", metadata=nothing)
        svg = re.sub(r"<!--.*?-->", "", text.getvalue(), flags=re.DOTALL)
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r'xlink:href="#', 'href="#', svg)
        svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)  # the HTML parser knows them
        svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
        for colour, variable in _COLOURS.items():
            svg = svg.replace(colour, variable)
        view_box = re.search(r'viewBox="[^"]*"', svg)
        assert view_box is not None
        opening = f'<svg {view_box[0]} role="img" aria-label="{escape(title)}">'
        return opening + svg[svg.index(">") + 1 :]
