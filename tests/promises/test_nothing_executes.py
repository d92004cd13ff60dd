"""Nothing that is read is executed: no pickle, no code beside a model, but by the command's own word."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import recoup

SOURCES = sorted(Path(recoup.__file__).parent.rglob("*.py"))
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
EXECUTES = {"eval", "exec", "compile", "__import__"}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call, by its name as it stands there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def named(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(word.value) for word in call.keywords if word.arg == name), None)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(SOURCES[0].parent).as_posix())
def test_no_source_reads_a_pickle_or_runs_text(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert not imported & PICKLES
    for name, call in calls(tree):
        assert name not in EXECUTES
        if name == "torch.load":
            assert named(call, "weights_only") == "True"
        if name in ("np.load", "numpy.load"):
            assert named(call, "allow_pickle") in (None, "False")
        if name.startswith("yaml.") and name.endswith("load"):
            assert "SafeLoader" in ast.unparse(call) or "_OnceLoader" in ast.unparse(call)
        if name.endswith(".from_pretrained"):  # None would ask at the terminal, and wait for an answer
            assert named(call, "trust_remote_code") in ("False", "trust_remote_code") or "**source" in (
                ast.unparse(call)
            ), f"{name} in line {call.lineno}"
