"""What a run says of itself: notes for the reader of the report, and run.json for programs."""

from collections import defaultdict
from dataclasses import asdict
from typing import Any

from recoup.explain import Explanation
from recoup.ladder.climb import rung_json
from recoup.validate import Cost, Report


def notes_of(account: Explanation, costs: tuple[Cost, Cost] | None, slow: str | None) -> list[str]:
    """What a reader should know beside the figures.

    Args:
        account: of every parameter.
        costs: of both files; None where nothing was exported.
        slow: what is to be said where the exported one is slower.
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
    if costs is None:
        notes.append("Nothing was exported, because no rung kept the quality.")
    if slow is not None:
        notes.append(f"{slow[0].upper()}{slow[1:]}.")
    return notes


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
        "seconds": round(seconds, 1),
        "notes": report.notes,
        "facts": report.facts,
    }
