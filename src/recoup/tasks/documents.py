"""Labelled texts in JSON lines: read whole, checked line by line, split so that no text is seen twice."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recoup.tasks.task import too_few
from recoup.tasks.texts import json_lines, text_of, value_of

# Which documents measure does not follow the recipe's seed: runs with other seeds stay comparable.
MEASURING_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text and the label that a person gave it."""

    text: str
    label: str


@dataclass(frozen=True, kw_only=True)
class Split:
    """Documents by use; no text is in two of them.

    Args:
        probe: what the linear probe is fitted on.
        calibration: what calibration sees.
        train: what distillation sees.
        also_in_test, twice_in_train: documents of the train file that were left out, and why.
    """

    probe: list[Document]
    calibration: list[Document]
    train: list[Document]
    also_in_test: int
    twice_in_train: int


def read(path: Path, text: str, label: str) -> list[Document]:
    """The documents of a file of JSON lines, in its order. Blank lines are not documents.

    Args:
        path: the file, UTF-8.
        text: the key of the text, a string that is not blank.
        label: the key of the label, a string or an integer.

    Raises:
        ValueError: one line with file, line number and what is wrong there; also fewer than two documents.
        FileNotFoundError: no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; task.data wants files of JSON lines")
    found = [_document(row, where, text, label) for where, row in json_lines(path)]
    if len(found) < 2:
        raise ValueError(f"{path}: {len(found)} documents found; a task needs at least two")
    return found


def split(
    train: Sequence[Document],
    test: Sequence[Document],
    *,
    probe: int,
    calibration: int,
    seed: int,
    where: Path,
) -> Split:
    """The train documents cut into probe, calibration and the rest, shuffled; texts of the test left out.

    Args:
        train: documents in file order.
        test: the whole test file, whichever part of it is measured on.
        probe: how many documents.
        calibration: how many documents.
        seed: of what is calibrated and trained on, and in which order.
        where: the train file, for messages.

    Raises:
        ValueError: too few documents for the probe or the calibration.
    """
    tested = {document.text for document in test}
    unseen = [document for document in train if document.text not in tested]
    once = list({document.text: document for document in reversed(unseen)}.values())[::-1]
    if len(once) < probe:
        raise ValueError(
            f"probe_documents: {probe} asked, {len(once)} found in {where} besides {len(train) - len(once)} "
            "duplicates; give it more, or lower probe_documents"
        )
    random.Random(MEASURING_SEED).shuffle(once)
    rest = once[probe:]
    if len(rest) < calibration:
        raise too_few(calibration, len(rest), f"{where} after {probe} for the probe")
    random.Random(seed).shuffle(rest)
    return Split(
        probe=once[:probe],
        calibration=rest[:calibration],
        train=rest[calibration:],
        also_in_test=len(train) - len(unseen),
        twice_in_train=len(unseen) - len(once),
    )


def some(documents: list[Document], count: int | None, where: Path) -> list[Document]:
    """`count` of the documents, drawn from all over the file and in its order; all of them for None.

    Raises:
        ValueError: fewer than that.
    """
    if count is None:
        return documents
    if count > len(documents):
        raise ValueError(
            f"test_documents: {count} asked, {len(documents)} found in {where}; "
            "leave test_documents out to use all"
        )
    chosen = random.Random(MEASURING_SEED).sample(range(len(documents)), count)
    return [documents[index] for index in sorted(chosen)]


def _document(row: dict[str, Any], where: str, text: str, label: str) -> Document:
    found = {
        name: value_of(row, key, where, f"task.data.{name}")
        for name, key in (("text", text), ("label", label))
    }
    if not isinstance(found["label"], str | int):
        raise ValueError(f"{where}: {label!r} is {found['label']!r}, expected a string or an integer")
    content = text_of(found["text"], text, where)
    if not content.strip():
        raise ValueError(f"{where}: {text!r} is {content!r}, expected a text")
    return Document(text=content, label=str(found["label"]))
