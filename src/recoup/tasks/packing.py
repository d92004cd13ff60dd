"""Tokens of documents, end to end, cut into sequences of one length; and what two texts have in common.

Every document ends with the end-of-sequence token, and begins with the one of the beginning where its
tokenizer puts that. A sequence may begin and end in the middle of a document and hold several: attention
reaches across them, as in pretraining.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt64
from numpy.typing import NDArray

from recoup.progress import watched

Ids = Int[NDArray[np.int64], " tokens"]

# Long enough that no fixed phrase is one (the longest that two State-of-the-Union addresses share has 23
# tokens), and short enough for a quotation to be.
PASSAGE = 32
_AT_ONCE = 32  # documents
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, with mixed bits: 2^64 divided by the golden ratio


def tokens_of(documents: Sequence[str], tokenizer: Any, description: str) -> list[Ids]:
    """The tokens of every document, the end-of-sequence token last.

    Raises:
        ValueError: the tokenizer has no such token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError(
            f"{tokenizer.name_or_path}: the tokenizer has no end-of-sequence token to put between documents; "
            "set eos_token and save it again"
        )
    found: list[Ids] = []
    groups = [documents[start : start + _AT_ONCE] for start in range(0, len(documents), _AT_ONCE)]
    for group in watched(groups, description):
        found += [_ended(ids, end) for ids in tokenizer(list(group), verbose=False)["input_ids"]]
    return found


def _ended(ids: list[int], end: int) -> Ids:
    return np.array(ids if ids[-1:] == [end] else [*ids, end], dtype=np.int64)


def pack(tokens: Ids, length: int) -> Int[NDArray[np.int64], "sequences length"]:
    """Whole sequences, in the order of the text; what is left at the end of it is dropped.

    >>> pack(np.arange(7), 3)
    array([[0, 1, 2],
           [3, 4, 5]])
    """
    whole = len(tokens) // length * length
    return tokens[:whole].reshape(-1, length)


def repeated(text: Ids, other: Ids) -> tuple[Bool[NDArray[np.bool_], " tokens"], NDArray[np.intp]]:
    """Where passages of a text also stand in another.

    The text is cut into passages of 32 tokens; each is looked for at every place of the other. Passages are
    compared by a polynomial hash of 64 bits.

    Returns:
        For every token of the text, whether its passage was found; and the places in the other text where
        such passages begin.
    """
    covered = np.zeros(len(text), dtype=bool)
    if min(len(text), len(other)) < PASSAGE:
        return covered, np.empty(0, dtype=np.intp)
    wanted, there = _hashes(text)[::PASSAGE], _hashes(other)
    known = np.unique(wanted)
    nearest = np.minimum(np.searchsorted(known, there), len(known) - 1)
    places = np.flatnonzero(known[nearest] == there)
    covered[: len(wanted) * PASSAGE] = np.repeat(np.isin(wanted, there[places]), PASSAGE)
    return covered, places


def _hashes(tokens: Ids) -> UInt64[NDArray[np.uint64], " places"]:
    """One of every 32 neighbours: twice as many at each turn, h(ab) = h(a) m^|b| + h(b), modulo 2^64."""
    found, power, length = tokens.astype(np.uint64), _MULTIPLIER, 1
    while length < PASSAGE:
        found = found[:-length] * power + found[length:]
        with np.errstate(over="ignore"):
            power, length = power * power, 2 * length
    return found


def deciles(tokens: Ids, counts: Int[NDArray[np.int64], " words"]) -> Int[NDArray[np.int64], " tokens"]:
    """For every token the tenth of the text, 0 to 9 from rare to frequent, that its word lies in.

    Words are sorted by their count, those of one count by their id; a word lies as a whole in the tenth that
    its first token falls into. So all tokens of a word are in one tenth, and a frequent word may make the
    next tenth smaller.

    Args:
        tokens: of the text that is cut.
        counts: of every word, in whatever text tells what is rare.

    >>> deciles(np.array([7, 3, 7, 5, 7]), np.array([0, 0, 0, 9, 0, 1, 0, 4]))
    array([2, 8, 2, 0, 2])
    """
    words, places, here = np.unique(tokens, return_inverse=True, return_counts=True)
    order = np.lexsort((words, counts[words]))
    before = np.cumsum(here[order]) - here[order]
    tenth = np.empty(len(words), dtype=np.int64)
    tenth[order] = 10 * before // len(tokens)
    return tenth[places]
