"""Where would this model be faster than in float? Asked only when the artefact is slower than the float file.

Every other target that is installed and measures speed writes the model in float and quantized, with the
numbers of the plan where it holds them and else with the nearest of the presets that it holds. Both files are
measured next to each other, as those of the run were. Nothing but their time is known, and none stays.
"""

import copy
import math
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from recoup.calibrate import calibrate
from recoup.convert import convert
from recoup.export import TARGETS, preflight, usable
from recoup.export.export import writing
from recoup.ladder.run_folder import RunFolder
from recoup.ladder.standing import Trial
from recoup.nn import CODED_MODULES, Batch, check_shape, quant_type
from recoup.prepare import prepare
from recoup.progress import watched
from recoup.schemes import PRESETS, Plan, Scheme
from recoup.validate import Cost
from recoup.validate.cost import TIMED, WARM_UP
from recoup.validate.report import duration, is_slower, latencies

SECONDS = 600.0  # for all of them: none is begun that would need more than what is left


def try_other_targets(
    run: RunFolder, model: nn.Module, plan: Plan, target: str, example: Batch, say: Callable[[str], None]
) -> None:
    """Measure every other target, each a step of the run.

    Args:
        run: with both files of its own target measured.
        model: float; it is copied.
        plan: of the run.
        target: of the run.
        example: what is run.
        say: is told what is found.

    Raises:
        OSError: the folder cannot be written.
    """
    standing = run.standing
    tried = {target, *(trial.target for trial in standing.others)}
    names = [name for name in _timed() if name not in tried]
    say(f"slower than the float file; measuring {', '.join(names) or 'no other target: none is installed'}")
    for name in watched(names, "measuring other targets"):
        trial = _tried(run, model, plan, name, example)
        say(f"  {trial}")
        standing.others.append(trial)
        run.record("other-target", target=trial.target, scheme=trial.scheme, found=str(trial))
        run.save()
    standing.compared = True
    run.save()


def advice(target: str, costs: tuple[Cost, Cost] | None, others: Sequence[Trial]) -> str | None:
    """How much slower the artefact is, where, and what is faster than float; None if it is not slower.

    Another target is faster where its artefact takes less time than its own float file and than the run's.
    """
    if costs is None or not is_slower(costs):
        return None
    before, after = latencies(costs)
    here = (
        f"in {target} the artefact is slower than the float model: {duration(after)} against "
        f"{duration(before)} for a batch of {costs[1].batch}"
    )
    measured = sorted((trial for trial in others if trial.costs), key=lambda trial: latencies(trial.costs)[1])
    for trial in measured:
        there, latency = latencies(trial.costs)
        if latency < min(before, there):
            return f"{here}; faster than float is {trial}"
    if not measured:
        return f"{here}; no other target that is installed here runs this model"
    return f"{here}; not faster than float either: {', '.join(map(str, measured))}"


def nearest(model: nn.Module, plan: Plan, target: str) -> Plan:
    """The plan, with every scheme that the target does not hold replaced by the nearest preset that it holds.

    That is the one with the nearest number of bits, then with inputs likewise quantized or not; of those the
    first in the table of presets.

    Raises:
        ValueError: there is none for some module, or for such a model.

    >>> import torch, recoup
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 4))
    >>> nearest(model, recoup.resolve(model, "fp8"), "pytorch").modules
    {'0': 'w8a8'}
    """
    held: dict[str, Scheme] = {}
    for name, scheme in plan.schemes.items():
        paths = [path for path, used in plan.modules.items() if used == name]
        held[name] = _first_held(model, paths, scheme, target)
    return Plan(
        schemes={scheme.name: scheme for scheme in held.values()},
        modules={path: held[name].name for path, name in plan.modules.items()},
        kept=plan.kept,
    )


def _timed() -> list[str]:
    """The targets that are installed, and whose engines here say something about speed."""
    names: list[str] = []
    for name, target in TARGETS.items():
        try:
            usable(name)
        except ImportError:
            continue  # a target that is not installed is none that could be named
        if target.timed:
            names.append(name)
    return names


def _tried(run: RunFolder, model: nn.Module, plan: Plan, name: str, example: Batch) -> Trial:
    start, standing = time.monotonic(), run.standing
    expected = (TIMED + WARM_UP) * sum(latencies(standing.costs))
    if expected > SECONDS - sum(trial.seconds for trial in standing.others):
        return Trial(
            target=name, refused=f"not measured, it would take {duration(expected)} of {duration(SECONDS)}"
        )
    folder = run.other_target
    with writing(folder):
        folder.mkdir(parents=True)
    scheme, costs, refused = "", None, ""
    try:
        other = nearest(model, plan, name)
        scheme, costs = " and ".join(other.schemes), _measured(model, other, name, example, folder)
    except (ValueError, RuntimeError) as error:  # it cannot hold, trace or run this model
        refused = " ".join(str(error).split())
    finally:
        shutil.rmtree(folder)
    seconds = time.monotonic() - start
    return Trial(target=name, scheme=scheme, costs=costs, refused=refused, seconds=seconds)


def _measured(model: nn.Module, plan: Plan, name: str, example: Batch, folder: Path) -> tuple[Cost, Cost]:
    target = TARGETS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are of files that nobody keeps
        preflight(model, plan, name)
        coded = convert(calibrate(prepare(_copied(model), plan), [example], observer="minmax"))
        files = folder / "float", folder / "artefact"
        for file, written in zip(files, (_copied(model), coded.eval()), strict=True):
            file.mkdir()
            with writing(file):
                target.write(written, file, example)
        return target.costs(files, example)


def _copied(model: nn.Module) -> nn.Module:
    """On the CPU, in eval mode; it shares the Parameters of a model that is there."""
    here = all(parameter.device.type == "cpu" for parameter in model.parameters())
    shared = {id(parameter): parameter for parameter in model.parameters()} if here else {}
    return copy.deepcopy(model, shared).cpu().eval()


def _first_held(model: nn.Module, paths: Sequence[str], scheme: Scheme, target: str) -> Scheme:
    refused: list[ValueError] = []
    for candidate in (scheme, *sorted(PRESETS.values(), key=lambda preset: _distance(scheme, preset))):
        try:
            for path in paths:
                check_shape(path, model.get_submodule(path), candidate)
            TARGETS[target].check(model, {path: (candidate, _coded_type(model, path)) for path in paths})
        except ValueError as error:
            refused.append(error)
        else:
            return candidate
    raise refused[0]


def _coded_type(model: nn.Module, path: str) -> type:
    kind = quant_type(model.get_submodule(path))
    assert kind is not None
    return CODED_MODULES[kind]  # pyright: ignore[reportArgumentType]


def _distance(scheme: Scheme, preset: Scheme) -> tuple[float, bool]:
    bits = math.fabs(scheme.weights.format.bits - preset.weights.format.bits)
    return bits, (scheme.inputs is None) != (preset.inputs is None)
