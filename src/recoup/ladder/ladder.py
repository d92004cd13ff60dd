"""The ladder: baseline, then the cheapest rung that keeps the quality, then export, and the gates again.

    float model -> baseline -> rtn -> gate -> mse -> gate -> qat -> gate -> export -> gate on the file

The first rung that passes every gate is the result. What is judged in the end is the exported file, read
back and run in its engine; the model in memory was only the way there. Every arrow is a step that is on the
disk before the next one begins: a run that was stopped goes on where it was.
"""

import copy
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recoup.explain import Explanation, explain
from recoup.export import export, preflight, usable
from recoup.export.export import writing
from recoup.export.targets import Target
from recoup.ladder.account import notes_of, plan_json, raised, retuned, run_json
from recoup.ladder.climb import Climb, Evaluate, measured, rung_json
from recoup.ladder.facts import facts_of, identity_of
from recoup.ladder.other_targets import advice, try_other_targets
from recoup.ladder.raising import raised_plan
from recoup.ladder.refusals import check_data, check_rungs
from recoup.ladder.retune import Retuning
from recoup.ladder.run_folder import PLAN, RunFolder, begun, outcome_of_part
from recoup.ladder.standing import Part, rungs_of
from recoup.nn import Batch, without_labels
from recoup.prepare import prepare, resolve
from recoup.progress import busy
from recoup.schemes import Plan, Recipe
from recoup.transforms import fuse, smooth, untie
from recoup.validate import Gate, Report, Rung, Samples, Verdict, html, outcome_of, write
from recoup.validate.report import is_slower


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came out of a run.

    Args:
        outcome: "passed", "failed" or "undecided": of the exported file after a whole run and after the part
            "validate", where there is one; else of the chosen rung.
        rung: the rung that was chosen: the first that passed, or else the best.
        verdicts: that the outcome is from.
        folder: of the run.
        artefact: the exported folder; None where there is none, as when every rung failed.
        model: as the chosen rung made it, prepared.
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
    part: Part | None = None,
) -> Result:
    """Find the cheapest path to a quantized model that passes every gate, and prove it on the exported file.

    Changes the model in place. Everything that can be refused is refused before the first measurement. A run
    that was stopped, by whatever, goes on when it is called again with the float model and the same data, and
    ends as if nothing had happened.

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
        facts: more to say in the report about model and data. Those with "sha256" in their name belong to
            the run: it goes on only where they are the same.
        title: of the report.
        say: is told what happens, a line at a time.
        part: do a part of the run only: "ptq" climbs the rungs before qat, "qat" all of them, "export"
            writes the best rung's artefact whatever its outcome, "validate" measures that and writes the
            report. None does all of it, and exports nothing where every rung failed.

    Raises:
        ValueError: recipe, model, data or folder cannot be used; one line.
        OSError: the folder cannot be written; what was saved before is kept.
        NonFiniteLossError, ParityError: training or export went wrong; see there.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    gates, rungs = _gates(recipe), rungs_of(part, recipe)
    target = usable(recipe.export.target)
    check_data(recipe, calibration, train)
    if part in ("export", "validate"):
        outcome_of_part(folder, recipe, part)
    known = {**facts_of(model, calibration, train, recipe), **(facts or {})}
    example = without_labels(calibration[0])
    fuse(model, example)
    if recipe.untie:
        untie(model)
    plan = resolve(model, recipe)
    preflight(
        model,
        plan,
        recipe.export.target,
        tensor_parallel=recipe.export.tensor_parallel,
        consumer=recipe.export.consumer,
        gpu=recipe.export.gpu,
    )
    if not begun(folder):
        check_rungs(model, plan, recipe, calibration, train)
    given = None if baseline is None else _askable(baseline, gates)

    run = RunFolder(folder, recipe, identity_of(known))
    if run.standing.step:
        done = ", ".join(["baseline", *(rung.name for rung in run.standing.rungs)])
        say(f"going on; measured already: {done}")
    before = _baseline(run, recipe, gates, model, evaluate, given, say)
    _write_float_file(run, target, model, example)
    if recipe.smooth:
        say("balancing channels")
        smooth(model, plan, calibration, samples=recipe.calibration.samples)
    plain = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    standing, base = run.standing, plan
    plan = raised_plan(plain, recipe, standing.raised) if standing.raised else base
    prepare(model, plan, impl=recipe.impl)
    run.write_json(PLAN, plan_json(plan, base))
    climb = Climb(model, recipe, gates, before, evaluate, calibration, train, run, say)
    climb.up(rungs)
    if standing.retunes(part, recipe):
        plan = Retuning(climb, plain, plan).to_the_end()
        run.write_json(PLAN, plan_json(plan, base))
    chosen = standing.best
    assert chosen is not None
    if standing.exported != chosen.name:
        standing.drop_artefact()  # of a rung before it, with a verdict that says nothing of this one
        if part == "export" or (part is None and chosen.outcome != "failed"):
            _export(run, recipe, model, example, chosen, say)
    shipped = standing.exported is not None
    if shipped and part in (None, "validate"):
        _measure_artefact(run, recipe, target, example, gates, before, evaluate, say)
        if not standing.compared:
            try_other_targets(run, plain, plan, recipe.export.target, example, say)
        slow = advice(recipe.export.target, standing.costs, standing.others)
        if slow is not None:
            warnings.warn(slow, stacklevel=2)
    if shipped:
        known["parity"] = standing.parity
    title = title or "recoup run"
    record = _report(title, run, recipe, base, plan, explain(plain, plan), chosen, before, known)
    if part in (None, "validate"):
        write(record, run.path)
        if not standing.left(recipe.rungs) and not standing.retunes(None, recipe):
            run.finish(run_json(record, run.seconds))
    final = (standing.artefact if part in (None, "validate") else None) or chosen
    return Result(
        outcome=final.outcome,
        rung=chosen.name,
        verdicts=final.verdicts,
        folder=run.path,
        artefact=run.artefact if shipped else None,
        model=model,
        record=record,
    )


def _baseline(
    run: RunFolder,
    recipe: Recipe,
    gates: list[Gate],
    model: nn.Module,
    evaluate: Evaluate,
    given: Samples | None,
    say: Callable[[str], None],
) -> Samples:
    """What the float model scores, sample by sample: as it is on the disk, as it was given, or measured."""
    if run.baseline:
        return _samples(run.baseline)
    if given is None:
        say("measuring the float model")
        torch.manual_seed(recipe.seed)
        given = _askable(measured(evaluate, model), gates)
    run.record("baseline", metrics=given.summary())
    say(f"float: {_line(given.summary())}")
    run.baseline = _tensors(given)
    run.save()
    return given


def _write_float_file(run: RunFolder, target: Target, model: nn.Module, example: Batch) -> None:
    """The float model as the engine runs it, for the costs; before `prepare`, and once."""
    if run.float_file.exists():
        return
    draft = run.float_file.with_name(".float")
    with writing(run.float_file), busy("writing the float file"):
        draft.mkdir()
        target.write(model, draft, example)
        draft.rename(run.float_file)


def _export(
    run: RunFolder,
    recipe: Recipe,
    model: nn.Module,
    example: Batch,
    chosen: Rung,
    say: Callable[[str], None],
) -> None:
    """Write the artefact of a rung, in the place of one of a rung before it."""
    standing = run.standing
    say(f"exporting {chosen.name} ({chosen.outcome}) for {recipe.export.target}")
    run.free_artefact()
    with busy("exporting"):
        parity = export(model, run.artefact, recipe.export.target, example=example)
    run.record("export", rung=chosen.name, parity=parity.to_json())
    say(f"the file is what was trained: {parity}")
    standing.exported, standing.parity = chosen.name, str(parity)
    run.save()


def _measure_artefact(
    run: RunFolder,
    recipe: Recipe,
    target: Target,
    example: Batch,
    gates: list[Gate],
    before: Samples,
    evaluate: Evaluate,
    say: Callable[[str], None],
) -> None:
    """Quality through the gates, cost next to the float file."""
    standing, start = run.standing, time.monotonic()
    if standing.artefact is not None:
        return
    torch.manual_seed(recipe.seed)
    after = measured(evaluate, target.load(run.artefact))
    verdicts = [gate.check(before, after) for gate in gates]
    standing.artefact = Rung(
        name="exported file",
        metrics=after.summary(),
        verdicts=verdicts,
        seconds=time.monotonic() - start,
        outcome=outcome_of(verdicts),
    )
    run.record("artefact", **rung_json(standing.artefact))
    say(f"exported file: {standing.artefact.outcome}")
    for verdict in verdicts:
        say(f"  {verdict}")
    with busy("measuring size, speed and memory of both files"):
        costs = target.costs((run.float_file, run.artefact), example)
    for name, cost in zip(("float file", "exported file"), costs, strict=True):
        say(f"{name}: {cost}")
    standing.costs, standing.compared = costs, not is_slower(costs)
    run.save()


def _report(
    title: str,
    run: RunFolder,
    recipe: Recipe,
    base: Plan,
    plan: Plan,
    account: Explanation,
    chosen: Rung,
    before: Samples,
    facts: dict[str, str],
) -> Report:
    standing, more = run.standing, raised(plan, base)
    costs = standing.costs or (None, None)
    return Report(
        title=title,
        scheme=_scheme_text(base, recipe) + (f", {len(more)} modules raised" if more else ""),
        target=recipe.export.target,
        outcome=(standing.artefact or chosen).outcome,
        rung=chosen.name,
        baseline=before.summary(),
        rungs=standing.rungs,
        artefact=standing.artefact,
        float_cost=costs[0],
        artefact_cost=costs[1],
        curve=standing.curve,
        symptoms=standing.symptoms,
        layer_errors=standing.errors,
        notes=notes_of(
            account,
            standing.costs,
            advice(recipe.export.target, standing.costs, standing.others),
            smoothed=recipe.smooth,
        ),
        facts=facts,
        retuned=retuned(standing, recipe, more),
    )


def _samples(tensors: Mapping[str, Tensor]) -> Samples:
    """What `_tensors` gave."""
    found: dict[str, dict[str, Any]] = {"values": {}, "slices": {}}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(" ")
        found[kind][name] = tensor.numpy()
    return Samples(found["values"], found["slices"])


def _tensors(samples: Samples) -> dict[str, Tensor]:
    """Every value of every sample, and the slices, as tensors by name."""
    return {
        f"{kind} {name}": torch.from_numpy(np.array(values))
        for kind, given in (("values", samples.values), ("slices", samples.slices))
        for name, values in given.items()
    }


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
    cache = "" if plan.kv is None else f", keys and values {plan.kv}"
    return recipe.scheme.name + (f" (and {', '.join(others)} by rule)" if others else "") + cache
