"""The ladder: baseline, then the cheapest rung that keeps the quality, then export, and the gates again.

    float model -> baseline -> rtn -> gate -> mse -> gate -> qat -> gate -> export -> gate on the file

The first rung that passes every gate is the result. What is judged in the end is the exported file, read
back and run in its engine; the model in memory was only the way there.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from recoup.calibrate import calibrate
from recoup.explain import explain
from recoup.export import Parity, export, preflight, target_named
from recoup.ladder.account import notes_of, run_json
from recoup.ladder.climb import Climb, Evaluate, rung_json
from recoup.ladder.facts import facts_of
from recoup.ladder.run_folder import PLAN, RUN, RunFolder
from recoup.nn import Batch, size_of, without_labels
from recoup.prepare import prepare, resolve
from recoup.progress import busy
from recoup.schemes import Plan, Recipe, Scheme
from recoup.validate import Cost, Gate, Report, Rung, Samples, Verdict, html, outcome_of, write


def ptq(
    model: nn.Module, scheme: Recipe | Scheme | str, batches: Iterable[Batch], *, observer: str = "mse"
) -> nn.Module:
    """Post-training quantization in one call: resolve, prepare, calibrate; in place, returns the model.

    Args:
        model: float.
        scheme: a preset's name, a scheme or a recipe.
        batches: up to 512 samples are looked at.
        observer: see `calibrate`.

    Raises:
        ValueError: see `resolve` and `calibrate`.

    >>> import torch
    >>> model = ptq(torch.nn.Sequential(torch.nn.Linear(32, 4)), "w4a8", [torch.randn(8, 32)])
    >>> model[0].scheme.name
    'w4a8'
    """
    return calibrate(prepare(model, resolve(model, scheme)), batches, observer=observer)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came out of a run.

    Args:
        outcome: "passed", "failed" or "undecided", judged on the exported file where there is one.
        rung: the rung that was chosen: the first that passed, or else the best.
        verdicts: of the exported file, or of the chosen rung where nothing was exported.
        folder: of the run.
        artefact: the exported folder; None if every rung failed.
        model: as it was exported, prepared.
        record: everything the report says.
    """

    outcome: str
    rung: str
    verdicts: list[Verdict]
    folder: Path
    artefact: Path | None
    model: nn.Module
    record: Report

    def report(self, path: str | Path) -> None:
        """Write the HTML report, one self-contained file, to another place as well."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(html(self.record), encoding="utf-8")


def recover(
    model: nn.Module,
    recipe: Recipe | str | Path,
    *,
    calibration: Sequence[Batch],
    evaluate: Evaluate,
    train: Sequence[Batch] = (),
    folder: str | Path = "run",
    baseline: Samples | Mapping[str, Any] | None = None,
    facts: Mapping[str, str] | None = None,
    title: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Result:
    """Find the cheapest path to a quantized model that passes every gate, and prove it on the exported file.

    Changes the model in place. Everything that can be refused is refused before the first measurement.

    Args:
        model: float.
        recipe: or the path of its YAML file. It needs at least one gate.
        calibration: batches, looked at without labels.
        evaluate: model -> `Samples` (or a mapping of per-sample values, or of plain floats). It is called
            with the float model, with prepared ones and with the exported file, which is called as the
            model is.
        train: batches for the rung "qat". A share of them (`train.held_out`) is kept for choosing the step.
        folder: of the run; see `run_folder.py` for what it will hold.
        baseline: what `evaluate` says of the float model, if that is known already.
        facts: more to say in the report about model and data.
        title: of the report.
        say: is told what happens, a line at a time.

    Raises:
        ValueError: recipe, model, data or folder cannot be used; one line.
        NonFiniteLossError, ParityError: training or export went wrong; see there.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    gates = _gates(recipe)
    if "qat" in recipe.rungs and len(train) < 2:
        raise ValueError(
            f"the rung qat needs at least 2 training batches, one of them held out; found {len(train)}"
        )
    found = sum(map(size_of, calibration))
    if found < recipe.calibration.samples:
        raise ValueError(
            f"calibration: {recipe.calibration.samples} samples asked, {found} found; "
            "bring more, or ask for fewer"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("recover writes one folder from one process; under torchrun call recoup.train")
    plan = resolve(model, recipe)
    preflight(model, plan, recipe.export.target)
    target = target_named(recipe.export.target)
    before = None if baseline is None else _askable(baseline, gates)
    run = RunFolder(folder, recipe)
    torch.manual_seed(recipe.seed)

    example = without_labels(calibration[0])
    known = {**facts_of(model, calibration, recipe), **(facts or {})}
    account = explain(model, plan)
    if before is None:
        say("measuring the float model")
        before = _askable(evaluate(model), gates)
    run.record("baseline", metrics=before.summary())
    say(f"float: {_line(before.summary())}")

    with tempfile.TemporaryDirectory() as float_folder:
        with busy("writing the float file"):
            target.write(model, Path(float_folder), example)
        prepare(model, plan)
        run.write_json(PLAN, plan.to_json())
        climb = Climb(model, recipe, gates, before, evaluate, calibration, train, run, say)
        chosen = climb.to_the_first_that_passes()
        shipped = None
        if chosen.outcome != "failed":
            shipped = _ship(model, recipe, run, Path(float_folder), example, gates, before, evaluate, say)
            known["parity"] = str(shipped.parity)
    final = chosen if shipped is None else shipped.rung
    costs = (None, None) if shipped is None else shipped.costs

    record = Report(
        title=title or "recoup run",
        scheme=_scheme_text(plan, recipe),
        target=recipe.export.target,
        outcome=final.outcome,
        rung=chosen.name,
        baseline=before.summary(),
        rungs=climb.rungs,
        artefact=None if shipped is None else shipped.rung,
        float_cost=costs[0],
        artefact_cost=costs[1],
        curve=climb.curve,
        layer_errors=climb.errors,
        notes=notes_of(account, costs),
        facts=known,
    )
    write(record, run.path)
    run.write_json(RUN, run_json(record, time.monotonic() - run.start))
    return Result(
        outcome=final.outcome,
        rung=chosen.name,
        verdicts=final.verdicts,
        folder=run.path,
        artefact=None if shipped is None else shipped.folder,
        model=model,
        record=record,
    )


class _Shipped(NamedTuple):
    folder: Path
    parity: Parity
    rung: Rung
    costs: tuple[Cost, Cost]


def _ship(
    model: nn.Module,
    recipe: Recipe,
    run: RunFolder,
    float_folder: Path,
    example: Batch,
    gates: list[Gate],
    before: Samples,
    evaluate: Evaluate,
    say: Callable[[str], None],
) -> _Shipped:
    """Export, and measure what was exported: quality through the gates, cost next to the float file."""
    target, folder, start = target_named(recipe.export.target), run.path / recipe.export.to, time.monotonic()
    say(f"exporting for {recipe.export.target}")
    with busy("exporting"):
        parity = export(model, folder, recipe.export.target, example=example)
    say(f"the file is what was trained: {parity}")
    after = Samples.of(evaluate(target.load(folder)))
    verdicts = [gate.check(before, after) for gate in gates]
    rung = Rung(
        name="exported file",
        metrics=after.summary(),
        verdicts=verdicts,
        seconds=time.monotonic() - start,
        outcome=outcome_of(verdicts),
    )
    run.record("artefact", parity=parity.to_json(), **rung_json(rung))
    say(f"exported file: {rung.outcome}")
    for verdict in verdicts:
        say(f"  {verdict}")
    with busy("measuring size, speed and memory of both files"):
        costs = target.costs((float_folder, folder), example)
    for name, cost in zip(("float file", "exported file"), costs, strict=True):
        say(
            f"{name}: {cost.bytes / 1e6:.1f} MB, {1000 * cost.seconds:.1f} ms for {cost.batch}, "
            f"peak {cost.peak_bytes / 1e6:.0f} MB"
        )
    return _Shipped(folder, parity, rung, costs)


def _gates(recipe: Recipe) -> list[Gate]:
    if not recipe.gates:
        raise ValueError(
            "the recipe has no gates, so nothing could pass; write for example "
            "gates: [{metric: accuracy, max_decrease: 2%}]"
        )
    return [
        Gate(
            g.metric,
            max_increase=g.max_increase,
            max_decrease=g.max_decrease,
            slice=g.slice,
            interval=g.interval,
        )
        for g in recipe.gates
    ]


def _askable(result: Samples | Mapping[str, Any], gates: list[Gate]) -> Samples:
    """A baseline of which every gate can be asked."""
    samples = Samples.of(result)
    for gate in gates:
        gate.check(samples, samples)
    return samples


def _line(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def _scheme_text(plan: Plan, recipe: Recipe) -> str:
    others = sorted(set(plan.schemes) - {recipe.scheme.name})
    return recipe.scheme.name + (f" (and {', '.join(others)} by rule)" if others else "")
