"""Models with recurrent layers: states continue from chunk to chunk and window to window, or return for a retry."""

from __future__ import annotations

import pytest
from _fakes import GREEDY, NEW, PROMPT, fleet, loaded, reference, state
from _models import HYBRIDS, WINDOWED, prompt_ids

from distkv_dask.errors import StateLostError
from distkv_dask.gang import PrefillChunk
from distkv_dask.geometry import Geometry
from distkv_dask.worker.home.states import States

SPLIT = (("w1", 24), ("w2", 16), ("w0", PROMPT + NEW - 40))
TAIL_ELSEWHERE = (("w0", 40), ("w1", 32), ("w2", 20))


KEPT_AT_HOMES = [*HYBRIDS, *WINDOWED]


@pytest.mark.parametrize("family", KEPT_AT_HOMES)
@pytest.mark.parametrize("room", [SPLIT, TAIL_ELSEWHERE], ids=["tail at home", "tail elsewhere"])
def test_tokens_are_those_of_one_process_whatever_the_split(family: str, room) -> None:
    with fleet(loaded(family), 3) as made:
        placement = made.place(1, *room)
        first = made.prefill(1, placement, prompt_ids(PROMPT), 24, "w0")
        tokens, batch = [first], [state(1, placement, PROMPT, first, NEW - 1)]
        while batch:
            result, batch = made.decode("w0", batch, 5)
            tokens += result.tokens[1]
    assert tokens == reference(family).tokens


@pytest.mark.parametrize("family", KEPT_AT_HOMES)
def test_sequences_that_join_and_leave_a_batch_keep_their_own_states(family: str) -> None:
    lengths = {1: 31, 2: 9, 3: 1, 4: 44}
    news = {1: 14, 2: 5, 3: 9, 4: 12}
    tokens: dict[int, list[int]] = {}
    with fleet(loaded(family), 3) as made:
        batch = []
        for number, length in lengths.items():
            placement = made.place(number, ("w1", 8), ("w2", 8), ("w0", length + 16))
            first = made.prefill(number, placement, prompt_ids(length, number), 24, "w0")
            tokens[number] = [first]
            batch.append(state(number, placement, length, first, news[number] - 1))
            result, batch = made.decode("w0", batch[::-1], 3)  # in another order each time
            for one, some in result.tokens.items():
                tokens[one] += some
        while batch:
            result, batch = made.decode("w0", batch, 4)
            for one, some in result.tokens.items():
                tokens[one] += some
    for number, length in lengths.items():
        assert tokens[number] == reference(family, length, number, news[number]).tokens


@pytest.mark.parametrize("family", KEPT_AT_HOMES)
def test_a_window_or_chunk_that_runs_again_begins_from_the_committed_state(family: str) -> None:
    with fleet(loaded(family), 2) as made:
        placement = made.place(1, ("w1", 24), ("w0", PROMPT + NEW - 24))
        prompt = prompt_ids(PROMPT)
        for start, stop in ((0, 20), (20, PROMPT), (20, PROMPT)):
            gang = made.gang("w0", ["w1"])
            sampling = GREEDY if stop == PROMPT else None
            chunk = PrefillChunk(gang, 1, placement, start, tuple(prompt[start:stop]), sampling)
            first = made.run(gang, lambda runtime, chunk=chunk: runtime.prefill(chunk)).token
        batch = [state(1, placement, PROMPT, first, NEW - 1)]
        lost, _ = made.decode("w0", batch, 6)
        result, batch = made.decode("w0", batch, 6)
        assert result.tokens == lost.tokens
        rest, _ = made.decode("w0", batch, NEW)
    assert [first, *result.tokens[1], *rest.tokens[1]] == reference(family).tokens


@pytest.mark.parametrize("family", ["lfm2", "gemma2"])
def test_a_home_without_the_state_says_so_and_computes_nothing(family: str) -> None:
    with fleet(loaded(family), 2) as made:
        placement = made.place(1, ("w1", 16), ("w0", 40))
        first = made.prefill(1, placement, prompt_ids(30), 24, "w0")
        for wrong in (state(1, placement, 29, first, 9), state(2, placement, 30, first, 9)):
            with pytest.raises(StateLostError, match="from its first token") as raised:
                made.decode("w0", [wrong], 2)
            assert raised.value.sequence == wrong.sequence
        made.members["w0"].runtime.release_sequence(1)
        with pytest.raises(StateLostError):
            made.decode("w0", [state(1, placement, 30, first, 9)], 2)


def test_only_the_states_before_and_after_what_runs_are_kept_and_snapshots() -> None:
    states = States()
    for length in (0, 8, 16):
        states.begin_run(1, length)
        states.put(1, length + 8, {})
        states.snapshot(1, length + 8)
    assert states.begin_run(1, 16) == {}
    with pytest.raises(StateLostError):
        states.begin_run(1, 24)
    states.keep(1, (8, 24), ended=False)
    for sequence, length in ((2, 24), (3, 16), (4, 8), (5, 9)):
        states.adopt(sequence, 1, length)
    assert states.begin_run(2, 24) == states.begin_run(3, 16) == states.begin_run(4, 8) == {}
    states.keep(1, (24,), ended=True)
    states.adopt(6, 1, 24)
    assert states.begin_run(6, 24) == {}
    for sequence, length in ((1, 16), (5, 9)):
        with pytest.raises(StateLostError):
            states.begin_run(sequence, length)
    states.drop(1)
    states.adopt(7, 1, 24)
    with pytest.raises(StateLostError):
        states.begin_run(7, 24)


def test_a_model_with_recurrent_layers_says_how_large_a_state_is_and_which_layers_attend() -> None:
    geometry: Geometry = loaded("lfm2").geometry
    assert (geometry.layers, geometry.state_bytes) == (1, 2 * 96 * 3 * 4)
    assert [loaded(family).geometry.scan_once for family in HYBRIDS] == [family == "jamba" for family in HYBRIDS]
