"""What a .pt2 file may hold before torch.export.load gets to see it: nothing that executes.

`torch.export.load` trusts its file. It unpickles example inputs, custom objects and tensors of subclasses,
falls back from `weights_only=True` to plain pickle where that fails, evaluates the expressions of free sizes
as Python, compiles the guards, and resolves an operator's name to any attribute of torch. Files that recoup
writes need none of that, so a file with more in it than such a one is refused. What is here is a list of what
is allowed.
"""

import ast
import json
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

NOTES = "recoup.json"

_RECORDS = re.compile(
    r"""[^/]+/(
        archive_format | archive_version | byteorder | \.data/version | \.data/serialization_id
      | models/model\.json | extra/recoup\.json
      | data/weights/(weight_\d+ | model_weights_config\.json)
      | data/constants/(tensor_\d+ | model_constants_config\.json)
      | data/sample_inputs/model\.pt
    )""",
    re.VERBOSE,
)
# aten.from_file maps a file of the disk, for writing too
_OPERATORS = re.compile(
    r"torch\.ops\.aten\.(?!from_file\b)\w+\.\w+"
    r"|torch\.ops\.higher_order\.(cond|wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|torch\.sym_\w+|math\.\w+"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)"
)
_NAME = re.compile(r"(?!\d)\w*")
_PATH = re.compile(r"[\w.\- ]+")
_MALFORMED = (
    *(zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OSError),  # the last: a place before 0
    *(KeyError, IndexError, TypeError, AttributeError, ValueError, struct.error),
)
_FUNCTIONS = frozenset(
    name
    for names in (
        "Symbol Integer Float Rational Mul Add Pow Min Max Mod PythonMod FloorDiv CeilDiv CleanDiv",
        "IntTrueDiv FloatTrueDiv TruncToInt RoundToInt CeilToInt FloorToInt ToFloat PowByNatural",
        "ModularIndexing Where Equality Unequality StrictLessThan StrictGreaterThan LessThan GreaterThan",
        "Eq Ne Lt Le Gt Ge And Or Not true false True False oo int_oo Piecewise ExprCondPair Identity",
    )
    for name in names.split()
)


class RefusedError(ValueError):
    """What a file holds is not on the list; the message says what."""


def check_archive(file: Path) -> dict[str, Any]:
    """Look through a file, and return what recoup noted in it.

    Raises:
        ValueError: it is damaged, or holds something that a reader would execute; names it.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return _checked(file, archive)
    except RefusedError:
        raise
    except _MALFORMED as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file}: damaged ({reason}); export it again") from error


def _checked(file: Path, archive: zipfile.ZipFile) -> dict[str, Any]:
    sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    if len(sizes) != len(archive.infolist()) or len({name.partition("/")[0] for name in sizes}) != 1:
        _refuse(file, "two records of one name, or not one folder")
    for name in sizes:
        if not _RECORDS.fullmatch(name):
            _refuse(file, f"the record {name}")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        _refuse(file, "a compressed record")
    if sum(sizes.values()) > file.stat().st_size:
        raise ValueError("its records are longer than the file")
    root = next(iter(sizes)).partition("/")[0]
    if sizes.get(f"{root}/data/sample_inputs/model.pt"):
        _refuse(file, "pickled example inputs")
    if (broken := archive.testzip()) is not None:
        raise ValueError(broken)
    for kind in ("weights", "constants"):
        config = json.loads(archive.read(f"{root}/data/{kind}/model_{kind}_config.json"))
        for name, payload in config["config"].items():
            if payload["use_pickle"] is not False or payload["tensor_meta"] is None:
                _refuse(file, f"a pickled tensor, {name}")
            if f"{root}/data/{kind}/{payload['path_name']}" not in sizes:
                raise ValueError(f"no bytes of {name}")
    program = json.loads(archive.read(f"{root}/models/model.json"))
    if program["guards_code"] or program["graph_module"].get("treespec_namedtuple_fields"):
        _refuse(file, "guards or types of its own")
    _walk(file, program)
    if f"{root}/extra/{NOTES}" not in sizes:
        raise RefusedError(f"{file}: was not written by recoup; torch.export.load reads it, if you trust it")
    notes = json.loads(archive.read(f"{root}/extra/{NOTES}"))
    if not all(isinstance(notes[key], list) for key in ("inputs", "outputs", "calls")):
        raise ValueError(f"no lists in {NOTES}")
    return notes


def _refuse(file: Path, what: str) -> None:
    what = " ".join(what.split())
    raise RefusedError(f"{file}: holds {what}, which a file of recoup does not; it is not loaded")


def _walk(file: Path, value: Any) -> None:
    if isinstance(value, list):
        for element in value:
            _walk(file, element)
    if isinstance(value, dict):
        for key, element in value.items():
            if key in _ALLOWED and not _ALLOWED[key](element):
                _refuse(file, f"{key} {element!r}"[:200])
            _walk(file, element)


def _matches(pattern: re.Pattern[str]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, str) and pattern.fullmatch(value) is not None)


def _is_expression(text: Any) -> bool:
    """Arithmetic of named sizes: calls of known functions on numbers and names, and nothing else."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
        return False
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=function)) if function in _FUNCTIONS:
                pass
            case ast.Name(id=name) if name in _FUNCTIONS or re.fullmatch(r"[a-z]+\d+", name):
                pass
            case ast.Constant(value=str(name)) if re.fullmatch(r"\w+", name):
                pass
            case ast.Constant(value=bool() | int() | float()):
                pass
            case (
                ast.Expression() | ast.keyword() | ast.Load() | ast.BinOp() | ast.UnaryOp() | ast.Compare()
                | ast.operator() | ast.unaryop() | ast.cmpop()
            ):  # fmt: skip
                pass
            case _:
                return False
    return True


def _is_tree(text: Any, key: re.Pattern[str] = _PATH) -> bool:
    """A call's arguments, or its outputs: tuples, lists and dicts whose keys are such names."""
    _, tree = json.loads(text)
    pending = [tree]
    while pending:
        spec = pending.pop()
        if spec["type"] not in (None, "builtins.tuple", "builtins.list", "builtins.dict"):
            return False
        keys = [] if spec["context"] is None else json.loads(spec["context"])
        if not all(isinstance(name, str) and key.fullmatch(name) for name in keys or []):
            return False
        pending += spec["children_spec"]
    return True


def _are_names(names: Any) -> bool:
    return names is None or all(isinstance(name, str) and _NAME.fullmatch(name) for name in names)


_ALLOWED: Mapping[str, Callable[[Any], bool]] = {
    "target": _matches(_OPERATORS),
    "as_operator": _matches(_OPERATORS),
    "as_custom_obj": lambda _: False,
    "custom_obj": lambda _: False,
    "metadata": lambda value: not value,
    "expr_str": _is_expression,
    "name": _matches(_NAME),
    "as_name": _matches(_NAME),
    "forward_arg_names": _are_names,
    "parameter_name": _matches(_PATH),
    "buffer_name": _matches(_PATH),
    "tensor_constant_name": _matches(_PATH),
    "in_spec": lambda text: _is_tree(text, _NAME),  # its keys become names in code
    "out_spec": _is_tree,
}
