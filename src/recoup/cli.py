"""The command line: parse, call one function, print.

Exit codes: 0 every gate passed, 1 a gate failed, 2 wrong input, 3 undecided, 70 a bug of ours, 130
interrupted.
"""

import sys
import traceback
from pathlib import Path
from typing import Any

from cyclopts import App, CycloptsError
from rich.console import Console

EXIT_CODES = {"passed": 0, "failed": 1, "undecided": 3}
WRONG_INPUT, BUG, INTERRUPTED = 2, 70, 130

app = App(
    name="recoup",
    help="Recover the quality that quantization costs.",
    result_action="return_value",
    suppress_keyboard_interrupt=False,  # `_run` says how to go on
)


@app.command
def explain(recipe: Path) -> int:
    """Show what would happen to every parameter of the recipe's model. Changes nothing.

    Example: recoup explain recipes/demo.yaml

    Parameters
    ----------
    recipe
        A YAML file; see docs/recipe.md.
    """
    from recoup import Recipe, tasks
    from recoup import explain as account
    from recoup.prepare import resolve

    parsed = Recipe.load(recipe)
    model = tasks.load_model(parsed)
    print(account(model, resolve(model, parsed)))
    return 0


@app.command
def run(recipe: Path, *, to: Path | None = None) -> int:
    """Climb the ladder: the cheapest rung that keeps the quality, exported and measured again.

    Example: recoup run recipes/demo.yaml

    Parameters
    ----------
    recipe
        A YAML file; see docs/recipe.md.
    to
        The folder of the run. Default: runs/ and the name of the recipe.
    """
    from recoup import Recipe, recover, tasks
    from recoup.ladder import finished

    parsed = Recipe.load(recipe)
    folder = to or Path("runs") / recipe.stem
    done = finished(folder, parsed)
    if done is not None:
        print(
            f"{folder}: this run is done, with outcome {done['outcome']}; remove the folder to run it again"
        )
        return EXIT_CODES[done["outcome"]]
    task = tasks.load(parsed)
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
    )
    print(f"{result.outcome}: {result.rung}; the report is {folder / 'report.html'}")
    return EXIT_CODES[result.outcome]


def _say(line: str) -> None:
    print(line, flush=True)


def main(arguments: list[str] | None = None) -> None:
    """The console script."""
    sys.exit(_run(arguments))


def _run(arguments: list[str] | None) -> int:
    from recoup.export import ParityError
    from recoup.train import NonFiniteLossError

    console = Console(stderr=True)
    try:
        result: Any = app(arguments, error_console=console, exit_on_error=False, print_error=False)
    except KeyboardInterrupt:
        print("interrupted; the same command starts the run again", file=sys.stderr)
        return INTERRUPTED
    except (CycloptsError, ValueError, OSError, ImportError, NonFiniteLossError) as error:
        print(f"recoup: {_one_line(error)}", file=sys.stderr)
        return WRONG_INPUT
    except ParityError as error:
        print(f"recoup: the export is wrong, and was removed: {_one_line(error)}", file=sys.stderr)
        return BUG
    except Exception:  # noqa: BLE001 (a bug: say so, and do not exit as if a gate had failed)
        traceback.print_exc()
        return BUG
    return result if isinstance(result, int) else 0


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
