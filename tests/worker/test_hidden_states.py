"""Hidden states of a model that several threads run, and their sums: each thread gets its own, and NaN is refused."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distkv_dask.errors import ModelError, UnsupportedModelError
from distkv_dask.worker.model.hidden_states import ROWS, HiddenStates, as_bytes, summed


class Decoder(nn.Module):
    """Returns its input once all threads have called it."""

    def __init__(self, together: int = 1) -> None:
        super().__init__()
        self._barrier = threading.Barrier(together)

    def forward(self, given: Tensor) -> Any:
        self._barrier.wait(10)
        return SimpleNamespace(last_hidden_state=given[None])


def model_of(decoder: nn.Module) -> Any:
    return SimpleNamespace(get_decoder=lambda: decoder, config=SimpleNamespace(model_type="odd"))


def test_engines_of_one_process_do_not_get_each_others_hidden_states() -> None:
    decoder = Decoder(together=3)
    states, found = HiddenStates(model_of(decoder)), dict[int, list[Tensor]]()

    def run(number: int) -> None:
        took: list[Tensor] = found.setdefault(number, [])
        with states.taken(took.append if number else None):
            for step in range(3):
                decoder(torch.full((2, 4), 10.0 * number + step))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(30)
    assert [[float(one.mean()) for one in found[number]] for number in range(3)] == [[], [10, 11, 12], [20, 21, 22]]
    assert found[1][0].shape == (2, 4)


def test_a_model_that_shows_no_hidden_states_is_refused_and_runs_on_without() -> None:
    plain = nn.Identity()
    states = HiddenStates(model_of(plain))
    with states.taken(lambda _: None), pytest.raises(UnsupportedModelError, match="'odd' does not show"):
        plain(torch.ones(2, 4))
    assert plain(torch.ones(2, 4)).shape == (2, 4)


def test_sums_are_those_of_float64_and_what_is_not_finite_is_an_error() -> None:
    hidden = torch.randn(3 * ROWS + 5, 8) + 1e4
    ranges = [(0, 1), (3, 2 * ROWS + 9), (7, 3 * ROWS + 5)]
    for sums, (first, last) in zip(as_bytes(summed(hidden, ranges)), ranges, strict=True):
        expected = hidden.double().numpy()[first:last].sum(0)
        assert np.frombuffer(sums, "<f8") == pytest.approx(expected, rel=1e-14)
    hidden[5, 3] = float("inf")
    with pytest.raises(ModelError, match="not finite"):
        as_bytes(summed(hidden, ranges))
