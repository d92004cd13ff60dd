"""The command line: parse, call one function, print.

Exit codes: 0 every gate passed, 1 a gate failed, 2 wrong input, 3 undecided, 70 a bug of ours, 130
interrupted.
"""

import logging
import sys
import traceback
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console

if TYPE_CHECKING:
    from recoup.ladder import Part

EXIT_CODES = {"passed": 0, "failed": 1, "undecided": 3}
WRONG_INPUT, BUG, INTERRUPTED = 2, 70, 130
# transformers imports torchao where it is installed, which then warns of extensions for other machines.
_TALKATIVE = ("torchao", "torch.utils._pytree")

RecipeFile = Annotated[Path, Parameter(help="A YAML file; see docs/recipe.md.")]
RunFolder = Annotated[
    Path | None, Parameter(help="The folder of the run. Default: runs/ and the name of the recipe.")
]
Trust = Annotated[
    bool,
    Parameter(
        negative="", help="Run Python files that lie beside the model. Read them first; no recipe can say so."
    ),
]

app = App(
    name="recoup",
    help="""Recover the quality that quantization costs.

    Example: recoup run recipes/demo.yaml

    ptq, qat, export and validate are the parts of run, in the same folder. Whatever was stopped goes on when
    the same command is given again. Exit codes: 0 passed, 1 failed, 2 wrong input, 3 undecided, 70 a bug, 130
    interrupted.
    """,
    result_action="return_value",
    suppress_keyboard_interrupt=False,  # `_run` says how to go on
)


@app.command
def explain(recipe: RecipeFile, *, trust_remote_code: Trust = False) -> int:
    """Show what would happen to every parameter of the recipe's model, and in its target. Changes nothing.

    Example: recoup explain recipes/demo.yaml
    """
    from recoup import Recipe, tasks
    from recoup import explain as account
    from recoup.export import preflight, usable
    from recoup.prepare import resolve
    from recoup.transforms import untie

    parsed = Recipe.load(recipe)
    settings = parsed.export
    usable(settings.target)
    model = tasks.load_model(parsed, trust_remote_code=trust_remote_code)
    if parsed.untie:
        untie(model)
    plan = resolve(model, parsed)
    kernels = preflight(
        model,
        plan,
        settings.target,
        tensor_parallel=settings.tensor_parallel,
        consumer=settings.consumer,
        gpu=settings.gpu,
    )
    print(account(model, plan, kernels))
    return 0


@app.command
def run(recipe: RecipeFile, *, to: RunFolder = None, trust_remote_code: Trust = False) -> int:
    """Climb the ladder: the cheapest rung that keeps the quality, exported and measured again.

    Example: recoup run recipes/demo.yaml
    """
    return _go(recipe, to, None, trust_remote_code)


@app.command
def ptq(recipe: RecipeFile, *, to: RunFolder = None, trust_remote_code: Trust = False) -> int:
    """Measure the float model, and climb the rungs that only calibrate.

    Example: recoup ptq recipes/demo.yaml
    """
    return _go(recipe, to, "ptq", trust_remote_code)


@app.command
def qat(recipe: RecipeFile, *, to: RunFolder = None, trust_remote_code: Trust = False) -> int:
    """Go on with quantization-aware training, unless a rung before it passed; with ptq first.

    Example: recoup qat recipes/demo.yaml
    """
    return _go(recipe, to, "qat", trust_remote_code)


@app.command
def export(recipe: RecipeFile, *, to: RunFolder = None, trust_remote_code: Trust = False) -> int:
    """Write the artefact of the best rung so far, whatever its outcome, and compare it code for code.

    Example: recoup export recipes/demo.yaml
    """
    return _go(recipe, to, "export", trust_remote_code)


@app.command
def validate(recipe: RecipeFile, *, to: RunFolder = None, trust_remote_code: Trust = False) -> int:
    """Measure the exported artefact, ask the gates, and write the report.

    Example: recoup validate recipes/demo.yaml
    """
    return _go(recipe, to, "validate", trust_remote_code)


@app.command
def verify(
    artefact: Annotated[Path, Parameter(help="A folder that export, or another tool, wrote.")],
    *,
    model: Annotated[Path | None, Parameter(help="A folder with the float model, to compare with.")] = None,
) -> int:
    """Check an artefact again, from its folder alone: files, codes and scales, modules and outputs.

    Example: recoup verify runs/demo/artefact

    What another tool wrote (compressed-tensors, GPTQ, AWQ, AutoRound, ModelOpt) is decoded, and compared with
    the float model. Exit codes: 0 it is what was exported, 1 it is not, 2 no artefact, or a damaged one.
    """
    from recoup.export import verify as verified

    found = verified(artefact, model=model)
    print(found)
    return EXIT_CODES["passed" if found.same else "failed"]


def _go(recipe: Path, to: Path | None, part: "Part | None", trust_remote_code: bool) -> int:
    """A run, or a part of it; one that is done only says so."""
    from recoup import Recipe, recover, tasks
    from recoup.export import usable
    from recoup.ladder import outcome_of_part

    parsed = Recipe.load(recipe)
    usable(parsed.export.target)
    folder = to or Path("runs") / recipe.stem
    done = outcome_of_part(folder, parsed, part)
    if done is not None:
        again = "" if part else "; remove the folder to run it again"
        print(f"{folder}: {part or 'this run'} is done, with outcome {done}{again}")
        return EXIT_CODES[done]
    task = tasks.load(parsed, trust_remote_code=trust_remote_code)
    result = recover(
        task.model,
        parsed,
        calibration=task.calibration,
        train=task.train,
        evaluate=task.evaluate,
        baseline=task.baseline,
        folder=folder,
        facts=task.facts,
        title=recipe.stem,
        say=_say,
        part=part,
    )
    where = {
        "ptq": f"so far in {folder}",
        "qat": f"so far in {folder}",
        "export": f"the artefact is {result.artefact}",
    }.get(part or "", f"the report is {folder / 'report.html'}")
    print(f"{result.outcome}: {result.rung}; {where}")
    return EXIT_CODES[result.outcome]


def _say(line: str) -> None:
    print(line, flush=True)


def main(arguments: list[str] | None = None) -> None:
    """The console script."""
    sys.exit(_run(arguments))


def _run(arguments: list[str] | None) -> int:
    from safetensors import SafetensorError

    from recoup.export import ParityError
    from recoup.train import NonFiniteLossError

    wrong = (
        CycloptsError,
        ValueError,
        OSError,
        ImportError,
        NonFiniteLossError,
        SafetensorError,
    )
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    console = Console(stderr=True)
    with warnings.catch_warnings(), _told():
        warnings.showwarning = _warn
        try:
            result: Any = app(arguments, error_console=console, exit_on_error=False, print_error=False)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on where it stopped", file=sys.stderr)
            return INTERRUPTED
        except wrong as error:
            print(f"recoup: {_one_line(error)}", file=sys.stderr)
            return WRONG_INPUT
        except ParityError as error:
            print(f"recoup: the export is wrong, and was removed: {_one_line(error)}", file=sys.stderr)
            return BUG
        except Exception:  # noqa: BLE001 (a bug: say so, and do not exit as if a gate had failed)
            traceback.print_exc()
            return BUG
    return result if isinstance(result, int) else 0


@contextmanager
def _told() -> Generator[None]:
    """What the library logs as a warning is told as one."""
    log, handler = logging.getLogger("recoup"), logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("recoup: warning: %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def _warn(message: Warning | str, *_: Any) -> None:
    print(f"recoup: warning: {_one_line(message)}", file=sys.stderr)


def _one_line(said: object) -> str:
    return " ".join(str(said).split())
