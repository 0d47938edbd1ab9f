"""Proposals for a sequence's next tokens, compared with a search through the whole text."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from _examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from distkv_dask.worker.speculation import ngrams, proposer
from distkv_dask.worker.speculation.proposer import DocumentIndices, Proposer

TEXTS = st.lists(st.integers(0, 3) | st.sampled_from((2**31 - 1, 7)), max_size=40)


def searched(text: list[int], most: int) -> tuple[list[int], int]:
    """The tokens after the last of the longest matches, found by comparing all places token by token."""
    best, length = 0, 0
    for place in range(1, len(text)):
        alike = 0
        while alike < min(place, ngrams.LONGEST) and text[place - 1 - alike] == text[-1 - alike]:
            alike += 1
        if alike >= max(length, ngrams.SHORTEST):
            best, length = place, alike
    if not length or most < 1:
        return [], 0
    period = text[best:]
    return [period[at % len(period)] for at in range(most)], length


def read(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, np.int32)


@settings(max_examples=examples(300), deadline=None)
@given(TEXTS, st.integers(0, 40), st.lists(st.lists(st.integers(0, 3), max_size=5), max_size=8), st.integers(0, 5))
def test_the_longest_match_in_document_question_and_answer_is_found(
    prompt: list[int], shared: int, answer: list[list[int]], most: int
) -> None:
    text = read(prompt)
    document = DocumentIndices().of(1, text[:shared]) if 0 < shared <= len(prompt) else None
    made, whole = Proposer(text, document), list(prompt)
    for tokens in answer:
        assert made.propose(most) == searched(whole, most)
        made.add_tokens(tokens)
        whole += tokens
        assert (made.answer.tolist(), made.length) == (whole[len(prompt) :], len(whole))
    assert made.propose(most) == searched(whole, most)


def test_in_a_text_that_says_one_thing_again_and_again_only_the_last_places_are_looked_at() -> None:
    text = read([1, 2, 3, *[1, 2, 4] * 30, 1, 2])
    with mock.patch.object(ngrams, "NEAREST", 5):
        assert Proposer(text).propose(2)[0] == [4, 1]
        assert len(ngrams.PairIndex(text, 0, len(text)).after(text[-2:])) == 5
        assert len(ngrams.scan(text, 0, len(text))) == 5


def test_questions_on_one_document_share_its_index_and_old_ones_are_dropped() -> None:
    indices, text = DocumentIndices(), read([*range(50)])
    first = indices.of(1, text)
    assert indices.of(1, text.copy()) is first
    assert indices.of(1, text[:40]) is not first  # as much of it is asked about now
    with mock.patch.object(proposer, "KEPT_TOKENS", 100):
        second = indices.of(2, text)
        indices.of(3, text)
        assert indices.of(2, text) is second
        assert indices.of(1, text[:40]) is not first


@pytest.mark.parametrize("length", [0, 1, 2])
def test_nothing_is_proposed_of_a_text_too_short_to_repeat(length: int) -> None:
    assert Proposer(read([5] * length)).propose(3) == ([], 0)
