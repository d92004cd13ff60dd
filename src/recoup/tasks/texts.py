"""Text files as documents: plain text, JSON lines, parquet. Read whole, and checked while they are read."""

import glob
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from recoup.tasks.assets import locate
from recoup.tasks.task import need


def find(named: str | Sequence[str], folder: Path, key: str) -> dict[str, Path]:
    """The files that a recipe names, each under the name that a report should call it by.

    Args:
        named: paths, "asset:NAME/FILE" or shell patterns; the files of a pattern come in the order of their
            names.
        folder: where relative paths start.
        key: of the recipe, for messages.

    Raises:
        FileNotFoundError: no such file, or none that matches a pattern.
    """
    found: dict[str, Path] = {}
    for name in [named] if isinstance(named, str) else named:
        path = locate(name, folder)
        if path.is_file():
            found[name] = path
            continue
        matching = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        files = [match for match in matching if match.is_file()]
        if not files:
            raise FileNotFoundError(f"{path}: no such file; {key} wants {', '.join(READERS)} files")
        found |= {str(f.relative_to(folder) if f.is_relative_to(folder) else f): f for f in files}
    return found


def read(path: Path, text: str) -> list[str]:
    """The documents of a file, blank ones too: all of it (.txt), a line (.jsonl) or a row (.parquet) each.

    Args:
        path: the file; its ending says what it is.
        text: the key or column that has the text; plain text has none.

    Raises:
        ValueError: one line with the file, the place in it and what is wrong there.
        ImportError: parquet without pyarrow.
    """
    if path.suffix.lower() not in READERS:
        raise ValueError(f"{path}: {path.suffix or 'no ending'} found; there are {', '.join(READERS)}")
    documents = READERS[path.suffix.lower()](path, text)
    if not any(document.strip() for document in documents):
        raise ValueError(f"{path}: no text found; the file is empty or blank")
    return documents


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object of a file of JSON lines after its place, as in "train.jsonl:3". Blank lines are skipped.

    Raises:
        ValueError: a line that is not UTF-8, not JSON or not an object.
    """
    # By b"\n" alone: str.splitlines would also cut at U+2028, which JSON allows inside of a string.
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row: Any = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 text at byte {error.start} of the line") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON at column {error.colno}; every line is one object") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: {type(row).__name__} found; every line is one object")
        yield where, row


def value_of(row: dict[str, Any], key: str, where: str, setting: str) -> Any:
    """What stands under a key.

    Raises:
        ValueError: no such key; the message names those that there are.
    """
    if key not in row:
        raise no_key(where, key, list(row), setting)
    return row[key]


def text_of(value: Any, key: str, where: str) -> str:
    """The value as a text.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key!r} is {value!r}, expected a text")
    return value


def no_key(where: str, key: str, there: Sequence[str], setting: str) -> ValueError:
    """The error of a key or column that is not there."""
    names = ", ".join(map(repr, there)) or "none"
    return ValueError(f"{where}: no key {key!r}, there are {names}; set {setting}")


def _plain(path: Path, text: str) -> list[str]:
    del text
    data = path.read_bytes()
    try:
        return [data.decode("utf-8-sig")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text at byte {error.start}; save it as UTF-8") from None


def _json(path: Path, text: str) -> list[str]:
    return [
        text_of(value_of(row, text, where, "task.data.text"), text, where) for where, row in json_lines(path)
    ]


def _parquet(path: Path, text: str) -> list[str]:
    need(f"{path}", "demo", "pyarrow")
    import pyarrow as pa
    from pyarrow import parquet

    try:
        names: list[str] = parquet.read_schema(path).names
        if text not in names:
            raise no_key(str(path), text, names, "task.data.text")
        column: list[Any] = parquet.read_table(path, columns=[text])[text].to_pylist()
    except pa.ArrowException as error:
        raise ValueError(f"{path}: not a parquet file ({str(error).splitlines()[0]})") from None
    return [text_of(value, text, f"{path}, row {row}") for row, value in enumerate(column, start=1)]


READERS: dict[str, Callable[[Path, str], list[str]]] = {".txt": _plain, ".jsonl": _json, ".parquet": _parquet}
