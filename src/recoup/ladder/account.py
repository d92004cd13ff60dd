"""What a run says of itself: notes for the reader of the report, and run.json for programs."""

from collections import defaultdict
from dataclasses import asdict
from typing import Any

from recoup.explain import Explanation
from recoup.ladder.climb import rung_json
from recoup.ladder.standing import Standing
from recoup.ladder.tries import spent
from recoup.schemes import Plan, Recipe
from recoup.validate import Cost, Report
from recoup.validate.tries import Retuned


def notes_of(
    account: Explanation, costs: tuple[Cost, Cost] | None, slow: str | None, *, smoothed: bool
) -> list[str]:
    """What a reader should know beside the figures.

    Args:
        account: of every parameter.
        costs: of both files; None where nothing was exported.
        slow: what is to be said where the exported one is slower.
        smoothed: channels were balanced.
    """
    kept: dict[str, int] = defaultdict(int)
    for row in account.rows:
        if row.scheme == "float":
            kept[row.reason] += row.bytes_before
    largest = sorted(kept.items(), key=lambda entry: -entry[1])
    stay = [f"{reason} ({size / 1e6:.2f} MB)" for reason, size in largest]
    notes = [
        f"Parameters take {account.bytes_before / 1e6:.1f} MB in float and "
        f"{account.bytes_after / 1e6:.1f} MB in the formats of the plan, scales included.",
        f"In float stay: {', '.join(stay)}." if stay else "Nothing stays in float.",
    ]
    if smoothed:
        notes.append("The sizes of channels were balanced before anything was quantized.")
    if account.untied:
        before, after = account.cost_of_untying
        notes.append(
            f"Untied: {', '.join(f'{own} from {other}' for own, other in account.untied.items())}. Of the "
            f"bytes above, these copies are {before / 1e6:.2f} MB in float and {after / 1e6:.2f} MB in the "
            "formats of the plan; the float file has them, too."
        )
    if costs is None:
        notes.append("Nothing was exported, because no rung kept the quality.")
    if slow is not None:
        notes.append(f"{slow[0].upper()}{slow[1:]}.")
    return notes


def plan_json(plan: Plan, base: Plan) -> dict[str, Any]:
    """A plan as data; where re-tuning raised modules, it says which, and from what."""
    more = {name: {"from": was, "to": now} for name, (was, now) in raised(plan, base).items()}
    return plan.to_json() | ({"raised": more} if more else {})


def raised(plan: Plan, base: Plan) -> dict[str, tuple[str, str]]:
    """Module -> its presets in the plan of the recipe and in that of what is shipped, where they differ."""
    return {
        name: (base.modules[name], scheme)
        for name, scheme in plan.modules.items()
        if scheme != base.modules[name]
    }


def retuned(standing: Standing, recipe: Recipe, more: dict[str, tuple[str, str]]) -> Retuned | None:
    """What re-tuning tried; None where there was none.

    Args:
        standing: of the run.
        recipe: of the run.
        more: what is raised of what is shipped.
    """
    budget, tries = recipe.train.budget, standing.tries
    if budget is None or not tries:
        return None
    return Retuned(
        budget=budget,
        seconds=spent(tries),
        tries=tries,
        raised=more,
        advice=standing.advice,
    )


def run_json(report: Report, seconds: float) -> dict[str, Any]:
    """The run as data. Everything under "artefact" was measured on the files, read back."""
    artefact = None
    if report.artefact is not None and report.artefact_cost is not None and report.float_cost is not None:
        artefact = {
            "metrics": report.artefact.metrics,
            "bytes": report.artefact_cost.bytes,
            "latency_seconds": report.artefact_cost.seconds,
            "peak_bytes": report.artefact_cost.peak_bytes,
            "batch": report.artefact_cost.batch,
            "float": asdict(report.float_cost),
        }
    final = report.artefact or next(rung for rung in report.rungs if rung.name == report.rung)
    return {
        "outcome": report.outcome,
        "rung": report.rung,
        "scheme": report.scheme,
        "target": report.target,
        "baseline": report.baseline,
        "artefact": artefact,
        "verdicts": [verdict.to_json() for verdict in final.verdicts],
        "rungs": [rung_json(rung) for rung in report.rungs],
        "symptoms": [asdict(symptom) for symptom in report.symptoms],
        "retuning": None if report.retuned is None else asdict(report.retuned),
        "seconds": round(seconds, 1),
        "notes": report.notes,
        "facts": report.facts,
    }
