"""Folders of all formats: from what an older version wrote to what this one reads.

The format is a number in artefact.json. It goes up when a version could not verify the folders of the last
one without being told how. Each step of the way is a function here; folders that older versions wrote, in
tests/export/artefacts, hold it to that.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from recoup.export.artefact import FILE, FORMAT, Artefact, parse, read_json

Data = dict[str, Any]


def read(folder: Path) -> tuple[int, Artefact | None]:
    """The format of a folder, and its artefact, whatever version of recoup wrote it; None if no version did.

    Raises:
        ValueError: it is of a newer format, or damaged; one line.
    """
    file = folder / FILE
    if not file.is_file() and _target(folder) is None:
        return 0, None
    data: Data = read_json(file) if file.is_file() else {"format": 0}
    found = data.get("format")
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise ValueError(f"{file}: its format is {found!r}, and should be a number; export it again")
    if found > FORMAT:
        raise ValueError(
            f"{file}: format {found}, this recoup reads up to {FORMAT}; update it (pip install -U recoup)"
        )
    for step in range(found, FORMAT):
        data = MIGRATIONS[step](folder, data)
    return found, parse(file, data)


def _from_0(folder: Path, data: Data) -> Data:
    """Before there was artefact.json: nothing was recorded but parity.json."""
    return data | {"format": 1, "recoup": None, "target": _target(folder)}


def _target(folder: Path) -> str | None:
    """What a folder of format 0 was written for; None for a folder that recoup did not write."""
    if not (folder / "parity.json").is_file():
        return None
    if (folder / "model.onnx").is_file():  # only in onnx-qdq a choice of engines was noted
        return "onnx-qdq" if "engine" in read_json(folder / "parity.json") else "onnx"
    files = {"model.pt2": "pytorch", "model.gguf": "gguf", "config.json": "compressed-tensors"}
    return next((target for name, target in files.items() if (folder / name).is_file()), None)


MIGRATIONS: dict[int, Callable[[Path, Data], Data]] = {0: _from_0}
