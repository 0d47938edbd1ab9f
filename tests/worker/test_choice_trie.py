"""Choices as a trie: likelihoods compared with explicit sums, in few forwards, for any choices that begin alike."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import pytest
from _examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from distkv_dask.errors import InvalidRequestError, ModelError
from distkv_dask.gang import Gang, PrefillChunk
from distkv_dask.logprobs import TokenLogprob
from distkv_dask.placement import Span
from distkv_dask.sampling import SamplingParams
from distkv_dask.worker.home import choosing
from distkv_dask.worker.home.choosing import Choosing, rounds
from distkv_dask.worker.model.choices import ChoiceTrie
from distkv_dask.worker.model.sampling import Draw

ENDS = (90, 91)
GREEDY = SamplingParams()
some_choices = st.lists(
    st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple), min_size=1, max_size=6, unique=True
)


def logprob(before: Sequence[int], token: int) -> float:
    """The model's log probability of a token after others (and after the prompt)."""
    return -1.5 + math.sin(13 * token + sum((at + 2) * one for at, one in enumerate(before)))


def answered(before: Sequence[int], targets: Iterable[int]) -> list[TokenLogprob]:
    return [TokenLogprob(one, logprob(before, one), ((7, -0.1), (8, -0.2))) for one in targets]


def learned(choices: Sequence[tuple[int, ...]], ends: Sequence[int] = ENDS) -> tuple[ChoiceTrie, int]:
    """A trie with all requested log probabilities, and their number."""
    trie = ChoiceTrie(choices, ends)
    first = answered((), trie.after())
    trie.learn((), first)
    asked = len(first)
    for path in trie.paths:
        targets = trie.targets(path)
        assert len(targets) == len(path)
        scored = [one for at, some in enumerate(targets) for one in answered(path[: at + 1], some)]
        trie.learn(path, scored)
        asked += len(scored)
    return trie, asked


def likelihood(choice: Sequence[int], choices: Sequence[tuple[int, ...]]) -> float:
    """Sum of a choice's log probabilities, including the end's if another choice continues it."""
    whole = sum(logprob(choice[:at], token) for at, token in enumerate(choice))
    if any(other != choice and other[: len(choice)] == choice for other in choices):
        whole += math.log(sum(math.exp(logprob(choice, end)) for end in ENDS))
    return whole


@settings(max_examples=examples(150), deadline=None)
@given(some_choices)
def test_scores_are_the_probabilities_of_each_choice_among_all(choices: list[tuple[int, ...]]) -> None:
    trie, _ = learned(choices)
    chosen = trie.choose(Draw(GREEDY, 9))
    weights = [math.exp(likelihood(one, choices)) for one in choices]
    assert chosen.scores == pytest.approx([one / sum(weights) for one in weights], abs=1e-9)
    assert chosen.tokens == choices[max(range(len(choices)), key=weights.__getitem__)]
    assert chosen.logprobs == ()


@settings(max_examples=examples(100), deadline=None)
@given(some_choices)
def test_no_token_is_computed_that_no_choice_needs_and_none_twice_on_a_path(choices: list[tuple[int, ...]]) -> None:
    trie = ChoiceTrie(choices, ENDS)
    inner = {one[:at] for one in choices for at in range(1, len(one))}
    inner |= {one for one in choices for other in choices if other != one and other[: len(one)] == one}
    covered = {path[:at] for path in trie.paths for at in range(1, len(path) + 1)}
    assert covered == inner
    for one, other in itertools.permutations(trie.paths, 2):
        assert other[: len(one)] != one, "a path that is part of another is computed with it"
    assert trie.paths == sorted(trie.paths), "rounding depends on the order"


def test_ends_count_where_a_shorter_choice_would_go_on() -> None:
    trie = ChoiceTrie([(1,), (1, 2)], ENDS)
    assert trie.after() == (1,)
    assert trie.after((1,)) == (2, *ENDS)
    with pytest.raises(InvalidRequestError, match="choose other words"):
        ChoiceTrie([(1,), (1, 2)], ())
    assert ChoiceTrie([(1, 3), (1, 2)], ()).after((1,)) == (3, 2), "no choice begins another: no end is needed"


def test_an_end_that_is_a_choices_token_counts_once() -> None:
    trie, _ = learned([(1,), (1, 90), (1, 2)])
    scores = trie.choose(Draw(GREEDY, 9)).scores
    ends = math.exp(logprob((), 1)) * sum(math.exp(logprob((1,), end)) for end in ENDS)
    longer = [math.exp(logprob((), 1) + logprob((1,), token)) for token in (90, 2)]
    whole = ends + sum(longer)
    assert scores == pytest.approx([one / whole for one in (ends, *longer)])


@pytest.mark.parametrize(("wanted", "best"), [(0, ()), (1, ((7, -0.1),)), (2, ((7, -0.1), (8, -0.2)))])
def test_log_probabilities_come_with_as_many_others_as_are_wanted(wanted: int, best: tuple) -> None:
    choices = [(1, 2), (3,)]
    trie, _ = learned(choices)
    chosen = trie.choose(Draw(SamplingParams(logprobs=wanted), 9))
    assert [one.token_id for one in chosen.logprobs] == list(chosen.tokens)
    assert {one.best for one in chosen.logprobs} == {best}
    assert [one.logprob for one in chosen.logprobs] == [
        logprob(chosen.tokens[:at], token) for at, token in enumerate(chosen.tokens)
    ]


def test_draws_follow_the_probabilities_and_the_seed() -> None:
    choices = [(1,), (2,), (3, 1)]
    trie, _ = learned(choices)
    counts = dict.fromkeys(choices, 0)
    tries = 2000
    for seed in range(tries):
        draw = Draw(SamplingParams(temperature=1.0, seed=seed), 9)
        tokens = trie.choose(draw).tokens
        assert trie.choose(draw).tokens == tokens
        counts[tokens] += 1
    scores = trie.choose(Draw(GREEDY, 9)).scores
    for choice, score in zip(choices, scores, strict=True):
        assert counts[choice] / tries == pytest.approx(score, abs=5 * math.sqrt(score * (1 - score) / tries))


def test_likelihoods_that_are_no_numbers_choose_nothing() -> None:
    trie = ChoiceTrie([(1,), (2,)], ENDS)
    trie.learn((), [TokenLogprob(1, math.nan), TokenLogprob(2, math.nan)])
    with pytest.raises(ModelError, match="position 9 are not finite"):
        trie.choose(Draw(GREEDY, 9))


# The chunk of a request with choices

GANG = Gang("engine", 1, "gang-1", 1, "w0", ())


def chunk(choices: Sequence[tuple[int, ...]], **given: object) -> PrefillChunk:
    made = {"sampling": SamplingParams(logprobs=2), "choices": tuple(choices), **given}
    return PrefillChunk(GANG, 1, (Span("w0", 0, 64),), 10, (5, 6, 7), **made)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("targets", "best"),
    [((), 0), (((6,), (7,)), 0), (((6,),), 5)],
    ids=["no scores", "a prompt's scores", "some of them"],
)
def test_choices_are_scored_behind_the_prompts_own_targets(targets: tuple, best: int) -> None:
    choices = [(1, 2), (3,)]
    made = Choosing(chunk(choices, targets=targets, best=best), ENDS)
    asked = made.chunk
    assert len(asked.targets) == 3
    assert asked.targets[: len(targets)] == targets
    assert asked.targets[2] == (1, 3)
    assert all(not one for one in asked.targets[len(targets) : 2])
    assert asked.best == max(best, 2)
    own = [TokenLogprob(one, -0.5, tuple((token, -1.0) for token in range(asked.best))) for (one,) in targets]
    made.take_prompt_scores([*own, *answered((), (1, 3))])
    (path,) = made.paths()
    assert (path.start, path.tokens, path.targets, path.sampling) == (13, (1,), ((2,),), None)
    made.learn(path.tokens, answered((1,), (2,)))
    result = made.result()
    assert result.token is None
    assert [one.token_id for one in result.scored] == [one for (one,) in targets]
    assert all(len(one.best) == best for one in result.scored), "the prompt's own ask for fewer"
    assert result.chosen is not None
    weights = [math.exp(likelihood(one, choices)) for one in choices]
    assert result.chosen.scores == pytest.approx([one / sum(weights) for one in weights])


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(some_choices, min_size=1, max_size=4), st.integers(1, 9))
def test_paths_are_computed_one_of_each_request_at_a_time_within_the_rows(
    requests: list[list[tuple[int, ...]]], rows: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "ROWS", rows)
        made = [Choosing(chunk(one), ENDS) for one in requests]
        seen = []
        for batch in rounds(made):
            assert batch
            assert len({id(one) for one, _ in batch}) == len(batch), "paths of one request lie in the same place"
            tokens = [len(path.tokens) for _, path in batch]
            assert sum(tokens) <= rows or len(batch) == 1
            seen += [(made.index(one), path.tokens) for one, path in batch]
    assert sorted(seen) == sorted((at, path.tokens) for at, one in enumerate(made) for path in one.paths())
