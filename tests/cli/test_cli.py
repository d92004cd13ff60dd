"""Exit codes, and one line for whatever is wrong."""

import importlib
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from recoup import cli
from recoup.cli import _run
from recoup.export import ParityError
from recoup.train import NonFiniteLossError
from tests.ladder.conftest import quick
from tests.tasks.conftest import model, model_files, settings

__all__ = ["model", "model_files", "quick", "settings"]  # fixtures

TASK = """
import warnings
from pathlib import Path

import torch

def parts(right, raises=None, warns=None):
    torch.manual_seed(0)
    left = list(right)
    if warns:
        warnings.warn(warns)

    def evaluate(model):
        if not left:  # a later command: what it finds right is in a file
            left.extend(int(line) for line in Path("right.txt").read_text().split())
        if raises:
            raise {"KeyboardInterrupt": KeyboardInterrupt, "ZeroDivisionError": ZeroDivisionError}[raises]
        count = left.pop(0)
        return {"accuracy": [1] * count + [0] * (20 - count)}

    batches = [{"input": torch.randn(16, 32)} for _ in range(4)]
    model = torch.nn.Sequential(torch.nn.Linear(32, 8))
    return {"model": model, "calibration": batches, "evaluate": evaluate}
"""


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes the recipe of a task that is a function beside it, and makes its folder the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "cli_task", raising=False)
    (tmp_path / "cli_task.py").write_text(TASK)

    def write(right: list[int], arguments: dict[str, Any] | None = None, **fields: Any) -> Path:
        data = {
            "task": {
                "name": "custom",
                "entry": "cli_task:parts",
                "arguments": {"right": right, **(arguments or {})},
            },
            "scheme": "w4a16",
            "rungs": ["rtn"],
            "calibration": {"samples": 16},
            "gates": [{"metric": "accuracy", "max_decrease": "20%"}],
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data | fields))
        return tmp_path / "recipe.yaml"

    return write


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("right", "outcome", "code"),
    [([20, 20, 20], "passed", 0), ([20, 4], "failed", 1), ([20, 16, 16], "undecided", 3)],
)
def test_the_outcome_is_the_exit_code(
    custom: Callable[..., Path],
    right: list[int],
    outcome: str,
    code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = custom(right)
    assert _run(["run", str(recipe), "--to", "out"]) == code
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == f"{outcome}: rtn; the report is out/report.html"
    assert not said.err
    assert json.loads(Path("out/run.json").read_text())["outcome"] == outcome
    assert not Path("out/unfinished").exists()
    # The same command again: it is done, says so, and exits the same way.
    assert _run(["run", str(recipe), "--to", "out"]) == code
    again = capsys.readouterr()
    assert again.out == f"out: this run is done, with outcome {outcome}; remove the folder to run it again\n"


@pytest.mark.usefixtures("quick")
def test_without_a_folder_it_is_runs_and_the_recipes_name(custom: Callable[..., Path]) -> None:
    assert _run(["run", str(custom([20, 20, 20]))]) == 0
    assert Path("runs/recipe/run.json").is_file()


@pytest.mark.parametrize(("raises", "code"), [("KeyboardInterrupt", 130), ("ZeroDivisionError", 70)])
def test_interruptions_and_bugs_are_no_verdicts(
    custom: Callable[..., Path], raises: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(["run", str(custom([20], {"raises": raises})), "--to", "out"]) == code
    said = capsys.readouterr().err
    expected = (
        "interrupted; the same command goes on where it stopped" if code == 130 else "ZeroDivisionError"
    )
    assert said.splitlines()[-1] == expected
    assert ("Traceback" in said) == (code == 70)
    assert not Path("out/run.json").exists()


@pytest.mark.parametrize(
    ("error", "code"), [(NonFiniteLossError("step 3: the loss is nan"), 2), (ParityError("up: differs"), 70)]
)
def test_training_and_export_that_went_wrong(
    custom: Callable[..., Path],
    error: Exception,
    code: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("recoup.recover", fail)
    assert _run(["run", str(custom([20])), "--to", "out"]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert str(error) in line


def test_explain_prints_the_account_and_changes_nothing(custom: Callable[..., Path], tmp_path: Path) -> None:
    recipe = custom([])
    before = sorted(path for path in tmp_path.iterdir() if path.name != "__pycache__")
    done = subprocess.run(
        [sys.executable, "-c", "from recoup.cli import main; main()", "explain", str(recipe)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    head, weight, bias, total = done.stdout.splitlines()
    columns = ["parameter", "shape", "scheme", "bits", "bytes", "before", "after", "computed", "as", "reason"]
    assert head.split() == columns
    assert weight.split() == ["0.weight", "8", "x", "32", "w4a16", "5.0", "1,024", "160", "MatMulNBits"]
    assert bias.split()[0] == "0.bias"
    assert total.split()[0] == "total"
    assert sorted(path for path in tmp_path.iterdir() if path.name != "__pycache__") == before


def test_main_exits_with_the_code(custom: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["explain", "nothing.yaml"])
    assert done.value.code == 2
    with pytest.raises(SystemExit) as done:
        cli.main(["--help"])
    assert done.value.code == 0
    assert "explain" in capsys.readouterr().out


# --- the parts of a run, and how it goes on ---------------------------------------------------------------

COMMANDS = ("explain", "run", "ptq", "qat", "export", "validate")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run([command, "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"Usage: recoup {command} " in said
    assert f"Example: recoup {command} recipes/demo.yaml" in said
    assert ("--to" in said) == (command != "explain")


def test_help_names_every_command_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Example: recoup run recipes/demo.yaml" in said
    assert "0 passed, 1 failed, 2 wrong input, 3 undecided" in said
    assert all(f" {command} " in said for command in COMMANDS)


@pytest.mark.usefixtures("quick")
def test_the_parts_one_after_another(custom: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    recipe = custom([], rungs=["rtn", "qat"], train={"steps": 2}, calibration={"samples": 64})

    def part(name: str, right: str) -> tuple[int, str]:
        Path("right.txt").write_text(right)
        code = _run([name, str(recipe), "--to", "out"])
        said = capsys.readouterr()
        assert not said.err
        return code, said.out.splitlines()[-1]

    assert part("ptq", "20 4") == (1, "failed: rtn; so far in out")
    assert part("ptq", "") == (1, "out: ptq is done, with outcome failed")
    assert part("qat", "16") == (3, "undecided: qat; so far in out")
    assert part("export", "") == (3, f"undecided: qat; the artefact is {Path('out/artefact')}")
    assert part("export", "") == (3, "out: export is done, with outcome undecided")
    assert part("validate", "20") == (0, "passed: qat; the report is out/report.html")
    for name in ("run", "ptq", "qat", "export", "validate"):
        code, line = part(name, "")
        assert (code, "is done, with outcome passed" in line) == (0, True)


@pytest.mark.usefixtures("quick")
def test_a_part_without_what_comes_before_it_is_one_line(
    custom: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = custom([20])
    before = tree(tmp_path)
    for command in ("export", "validate"):
        assert _run([command, str(recipe), "--to", "out"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == "recoup: out: no rung is measured yet; run recoup ptq or recoup qat first"
    assert tree(tmp_path) == before


@pytest.mark.usefixtures("quick")
def test_an_interrupted_command_goes_on(
    custom: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = custom([20])

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("recoup.ladder.climb"), "calibrate", interrupt)
        assert _run(["run", str(recipe), "--to", "out"]) == 130
    assert capsys.readouterr().err == "interrupted; the same command goes on where it stopped\n"
    Path("right.txt").write_text("20")
    assert _run(["run", str(recipe), "--to", "out"]) == 0
    assert "going on; measured already: baseline" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_a_warning_is_one_line(custom: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    recipe = custom([20, 20, 20], {"warns": "train and test\noverlap by 3 %"})
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert _run(["run", str(recipe), "--to", "out"]) == 0
    assert capsys.readouterr().err == "recoup: warning: train and test overlap by 3 %\n"


@pytest.mark.usefixtures("quick")
def test_a_full_disk_is_one_line_and_the_command_goes_on(
    custom: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = custom([20, 20, 20])

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("recoup.train.snapshot"), "save_file", full)
        assert _run(["run", str(recipe), "--to", "out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("recoup: out/unfinished/steps/step-000001: cannot be written (No space left on")
    assert line.endswith("what was saved before it is kept: make room, and run the same again")
    assert _run(["run", str(recipe), "--to", "out"]) == 0


# --- wrong input: one line, exit code 2, no new file ----------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-64])


Fields = dict[str, Any]
WRONG: dict[str, tuple[Callable[[Fields], Any], list[str], str]] = {
    "no model folder": (
        lambda r: r["task"].update(model="./nothing"), [], "nothing"),
    "truncated weights": (lambda r: cut(Path("model/model.safetensors")), [], "model.safetensors"),
    "an unknown key": (
        lambda r: r.update(calibratoin={"samples": 3}), [], "unknown key; did you mean 'calibration'"),
    "an unknown key of the task": (lambda r: r["task"].update(max_token=3), [], "did you mean 'max_tokens'"),
    "a wrong type": (lambda r: r["calibration"].update(samples="many"), [], "calibration.samples: "),
    "a negative group": (lambda r: r.update(scheme="w4a16-g-4"), [], "a group of -4 asked"),
    "groups that do not divide": (lambda r: r.update(scheme="w4a16-g24"), [], "be cut into groups of 24"),
    "a rule for nothing": (
        lambda r: r.update(rules=[{"match": "lm_hed", "scheme": "none"}]), [], "rule 'lm_hed' matches no"),
    "a bare limit": (
        lambda r: r.update(gates=[{"metric": "accuracy", "max_decrease": 2}]), [], 'a limit is "2%"'),
    "no gates": (lambda r: r.update(gates=[]), [], "the recipe has no gates"),
    "a gate on nothing": (
        lambda r: r.update(gates=[{"metric": "acuracy", "max_decrease": "2%"}]), [], "'acuracy' asked"),
    "a scheme without a kernel": (lambda r: r.update(scheme="mxfp8"), [], "does not run in onnxruntime"),
    "no task": (lambda r: r.pop("task"), [], "the recipe has no task"),
    "an unknown task": (lambda r: r["task"].update(name="sentence"), [], "no task 'sentence'; did you mean"),
    "an empty dataset": (lambda r: Path("train.jsonl").write_text(""), [], "train.jsonl"),
    "a dataset of one line": (
        lambda r: Path("train.jsonl").write_text('{"text": "a", "label": "b"}\n'), [], "train.jsonl"),
    "too few calibration samples": (
        lambda r: r["calibration"].update(samples=5000), [], "5000"),
    "a folder under a file": (lambda r: None, ["--to", "test.jsonl/run"], "cannot be written"),
    "a folder that is a file": (lambda r: None, ["--to", "test.jsonl"], "test.jsonl: is a file"),
    "a folder with something else": (lambda r: None, ["--to", "model"], "is not empty and holds no run"),
    "an unknown option": (lambda r: None, ["--tp", "out"], "--tp"),
    "an argument too many": (lambda r: None, ["out", "more"], "more"),
}  # fmt: skip


def tree(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("damage", "options", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_line_and_leaves_nothing(
    settings: dict[str, Any],
    tmp_path: Path,
    damage: Callable[[Fields], Any],
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe: Fields = {
        "task": settings,
        "scheme": "w8a8",
        "calibration": {"samples": 20},
        "gates": [{"metric": "accuracy", "max_decrease": "2%"}],
    }
    damage(recipe)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    before = tree(tmp_path)
    assert _run(["run", "recipe.yaml", *options]) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("recoup: ")
    assert message in line
    assert tree(tmp_path) == before
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file or directory"),
        ("scheme: [w4a16", "recipe.yaml: line 1 not YAML"),
        ("- w4a16", "recipe.yaml: expected keys and values, found list"),
        ("rules: []", "recipe.yaml: scheme: missing"),
        (b"\xff\xfe", "recipe.yaml: not UTF-8 text at byte 0"),
    ],
)
@pytest.mark.parametrize("command", ["run", "explain"])
def test_a_recipe_that_cannot_be_read(
    command: str,
    text: str | bytes | None,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("recipe.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    before = tree(tmp_path)
    assert _run([command, "recipe.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert "recipe.yaml" in line
    assert tree(tmp_path) == before


@pytest.mark.parametrize("arguments", [["rnu", "recipe.yaml"], ["run"], ["run", "a.yaml", "--to"]])
def test_what_is_no_command_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("recoup: ")


@pytest.mark.usefixtures("quick")
def test_another_recipes_run_is_not_overwritten(
    custom: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(["run", str(custom([20, 20, 20])), "--to", "out"]) == 0
    recipe = custom([20, 20, 20], seed=1)
    before = tree(tmp_path / "out")
    capsys.readouterr()
    assert _run(["run", str(recipe), "--to", "out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "recoup: out: holds a run of another recipe; choose another folder, or remove it"
    assert tree(tmp_path / "out") == before


def test_what_is_logged_as_a_warning_is_told_as_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = logging.getLogger("recoup")

    def said(*_: Any, **__: Any) -> int:
        log.warning("step 1: up.weight: dead")
        log.info("not this")
        return 0

    monkeypatch.setattr(cli, "app", said)
    assert _run([]) == _run([]) == 0
    assert capsys.readouterr().err.splitlines() == ["recoup: warning: step 1: up.weight: dead"] * 2
    assert log.handlers == []
