"""Log probabilities compared with their float64 definition, for any logits, rows and numbers of alternatives."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from _examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from distkv_dask.errors import DistKVError, ModelError
from distkv_dask.logprobs import TokenLogprob
from distkv_dask.sampling import SamplingParams
from distkv_dask.worker.model import logprobs as module
from distkv_dask.worker.model.logprobs import Drawn, draw_batch, token_logprobs
from distkv_dask.worker.model.sampling import Draw

VOCAB = 17


def logits_of(rows: int, seed: int = 0, scale: float = 4.0) -> torch.Tensor:
    return torch.from_numpy((np.random.default_rng(seed).standard_normal((rows, VOCAB)) * scale).astype(np.float32))


def right(logits: torch.Tensor, row: int, token: int) -> float:
    """The definition, computed one number after the other."""
    scores = [float(one) for one in logits[row]]
    most = max(scores)
    return scores[token] - most - math.log(math.fsum(math.exp(one - most) for one in scores))


@settings(max_examples=examples(80), deadline=None)
@given(
    st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=3), max_size=9),
    st.integers(0, VOCAB + 5),
    st.integers(0, 99),
    st.floats(0.001, 300),
    st.integers(1, 4),
)
def test_tokens_of_many_rows_have_their_log_probabilities_in_order(
    tokens: list[list[int]], best: int, seed: int, scale: float, at_once: int
) -> None:
    logits = logits_of(len(tokens), seed, scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ROWS", at_once)
        found = token_logprobs(logits, tokens, best)
    places = [(row, token) for row, some in enumerate(tokens) for token in some]
    assert [one.token_id for one in found] == [token for _, token in places]
    for one, (row, token) in zip(found, places, strict=True):
        assert one.logprob == pytest.approx(right(logits, row, token), abs=1e-9)
        assert len(one.best) == min(best, VOCAB)
        values = [value for _, value in one.best]
        assert values == sorted(values, reverse=True)
        for other, value in one.best:
            assert value == pytest.approx(right(logits, row, other), abs=1e-9)
        others = {token for token, _ in one.best}
        assert len(others) == len(one.best)
        if others and len(others) < VOCAB:
            assert min(values) >= max(right(logits, row, other) for other in {*range(VOCAB)} - others) - 1e-9


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error_wherever_they_are(odd: float) -> None:
    logits = logits_of(5)
    logits[3, 2] = odd
    assert len(token_logprobs(logits[:3], [[1]] * 3, 2)) == 3
    with pytest.raises(ModelError, match="open the engine with dtype='float32'"):
        token_logprobs(logits, [[1]] * 5, 2)


def test_a_token_that_cannot_be_has_no_probability_and_is_no_error() -> None:
    logits = logits_of(1)
    logits[0, 4] = -math.inf
    (one,) = token_logprobs(logits, [[4]], 0)
    assert one == TokenLogprob(4, -math.inf)


# Draws


class Forbids:
    """A follower that allows only some tokens."""

    def __init__(self, *allowed: int) -> None:
        self._allowed = allowed

    def forbidden(self, vocab: int) -> torch.Tensor:
        found = torch.ones(vocab, dtype=torch.bool)
        found[[*self._allowed]] = False
        return found


class Fails:
    def forbidden(self, vocab: int) -> torch.Tensor:
        raise ValueError("odd")


def draw(logprobs: int | None = None, follower: Any = None, **given: Any) -> Draw:
    return Draw(SamplingParams(logprobs=logprobs, **given), 9, (), follower)


@pytest.mark.parametrize("wanted", [(None, None, None), (0, None, 3), (2, 2, 2), (None, None, 1)])
def test_who_wants_none_gets_none_and_the_same_token(wanted: tuple[int | None, ...]) -> None:
    logits = logits_of(3)
    drawn = draw_batch(logits.clone(), [draw(one) for one in wanted])
    assert all(isinstance(one, Drawn) for one in drawn)
    for row, (one, best) in enumerate(zip(drawn, wanted, strict=True)):
        assert one.token == int(logits[row].argmax())
        if best is None:
            assert one.logprob is None
        else:
            assert one.logprob is not None
            assert one.logprob.token_id == one.token
            assert one.logprob.logprob == pytest.approx(right(logits, row, one.token), abs=1e-9)
            assert len(one.logprob.best) == best


def test_probabilities_are_the_models_own_whatever_a_form_or_temperature_does() -> None:
    logits = logits_of(3)
    least = [int(one) for one in logits.argmin(-1)]
    draws = [
        draw(1, Forbids(least[0])),
        draw(1, temperature=1e-3, seed=5),
        draw(1, repetition_penalty=1e9)._replace(history=[*range(VOCAB)]),
    ]
    drawn = draw_batch(logits.clone(), draws)
    assert drawn[0].token == least[0]
    for row, one in enumerate(drawn):
        assert one.logprob.logprob == pytest.approx(right(logits, row, one.token), abs=1e-9)
        assert one.logprob.best[0][0] == int(logits[row].argmax())


def test_a_row_that_cannot_be_drawn_is_an_error_of_its_own() -> None:
    logits = logits_of(4)
    logits[2, 1] = math.nan
    drawn = draw_batch(logits.clone(), [draw(1), draw(1, Fails()), draw(None), draw(2)])
    assert [isinstance(one, DistKVError) for one in drawn] == [False, True, True, False]
    assert "position 9" in str(drawn[1])
    assert "not finite" in str(drawn[2])
    assert drawn[3].logprob.token_id == drawn[3].token == int(logits[3].argmax())
