"""Tokens of documents as sequences, what two texts share, and tenths by frequency."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recoup.tasks.packing import PASSAGE, deciles, pack, repeated, tokens_of


class Letters:
    """A tokenizer of which we know everything: a letter is a token, 0 is the end, 1 the beginning."""

    name_or_path = "letters"

    def __init__(
        self, end: int | None = 0, before: tuple[int, ...] = (), after: tuple[int, ...] = ()
    ) -> None:
        self.eos_token_id, self.before, self.after = end, before, after

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[*self.before, *map(ord, text), *self.after] for text in texts]}


A, B, C = map(ord, "abc")


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (Letters(), [[A, B, 0], [C, 0]]),
        (Letters(before=(1,)), [[1, A, B, 0], [1, C, 0]]),
        (Letters(after=(0,)), [[A, B, 0], [C, 0]]),
    ],
    ids=["nothing added", "a beginning added", "an end added"],
)
def test_documents_end_with_one_end_of_sequence(tokenizer: Letters, expected: list[list[int]]) -> None:
    assert [ids.tolist() for ids in tokens_of(["ab", "c"], tokenizer, "")] == expected


def test_more_documents_than_are_tokenized_at_once_stay_in_order() -> None:
    found = tokens_of([chr(A + index % 26) for index in range(100)], Letters(), "")
    assert [ids[0] for ids in found] == [A + index % 26 for index in range(100)]


def test_a_tokenizer_without_end_of_sequence_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"letters: the tokenizer has no end-of-sequence token .*; set eos"):
        tokens_of(["a"], Letters(end=None), "")


@given(st.integers(0, 50), st.integers(1, 9))
def test_sequences_are_the_text_but_for_its_end(count: int, length: int) -> None:
    packed = pack(np.arange(count), length)
    assert packed.shape == (count // length, length)
    assert np.array_equal(packed.ravel(), np.arange(packed.size))


@pytest.mark.parametrize("place", [0, 1, 700, 1000 - PASSAGE])
def test_a_passage_is_found_wherever_it_stands(place: int) -> None:
    draw = np.random.default_rng(0)
    text, other = draw.integers(0, 50, 100), draw.integers(0, 50, 1000)
    other[place : place + PASSAGE] = text[PASSAGE : 2 * PASSAGE]
    covered, places = repeated(text, other)
    assert places.tolist() == [place]
    assert np.flatnonzero(covered).tolist() == list(range(PASSAGE, 2 * PASSAGE))


def test_one_token_less_than_a_passage_is_not_found() -> None:
    draw = np.random.default_rng(0)
    text, other = draw.integers(0, 50, PASSAGE), draw.integers(0, 50, 1000)
    other[10 : 10 + PASSAGE - 1] = text[:-1]
    other[10 + PASSAGE - 1] = text[-1] + 1
    covered, places = repeated(text, other)
    assert not covered.any()
    assert not len(places)


@pytest.mark.parametrize("lengths", [(PASSAGE - 1, 100), (100, PASSAGE - 1), (0, 0)])
def test_texts_shorter_than_a_passage_share_none(lengths: tuple[int, int]) -> None:
    covered, places = repeated(np.zeros(lengths[0], np.int64), np.zeros(lengths[1], np.int64))
    assert covered.tolist() == [False] * lengths[0]
    assert not len(places)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=300))
def test_deciles_agree_with_their_definition(drawn: list[int]) -> None:
    tokens = np.array(drawn)
    counts = np.random.default_rng(0).integers(0, 5, 31)
    found = deciles(tokens, counts)
    times = Counter(drawn)
    for word in times:
        rarer = sum(times[w] for w in times if (counts[w], w) < (counts[word], word))
        assert set(found[tokens == word]) == {10 * rarer // len(drawn)}  # all of a word together
    assert 0 in found


def test_deciles_of_words_that_are_all_different_are_tenths() -> None:
    tokens = np.random.default_rng(0).permutation(100)
    found = deciles(tokens, np.arange(100))
    assert np.array_equal(found, tokens // 10)
