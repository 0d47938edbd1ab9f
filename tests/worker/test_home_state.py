"""Data that only homes have: snapshots are taken of running sequences, but not if the gManager no longer wants them."""

from __future__ import annotations

import pytest
from _fakes import GREEDY, NEW, PROMPT, fleet, loaded, reference, state
from _models import HYBRIDS, WINDOWED, prompt_ids

from distkv_dask.errors import StateLostError
from distkv_dask.gang import PrefillChunk
from distkv_dask.placement import Span

SHARED = 48


@pytest.mark.parametrize("family", [*HYBRIDS, *WINDOWED])
def test_a_sequence_that_begins_with_a_snapshot_has_the_tokens_of_one_process(family: str) -> None:
    with fleet(loaded(family), 2) as made:
        source = made.place(1, ("w1", 24), ("w0", PROMPT - 24))
        home = made.members["w0"].runtime
        for start, stop, snapshot in ((0, 24, False), (24, SHARED, True), (SHARED, PROMPT, False)):
            gang = made.gang("w0", ["w1"])
            tokens = tuple(prompt_ids(PROMPT)[start:stop])
            chunk = PrefillChunk(gang, 1, source, start, tokens, snapshot=snapshot)
            made.run(gang, lambda runtime, chunk=chunk: runtime.prefill(chunk))
        home.home_state.keep(1, (SHARED,), ended=True)
        for sequence in (2, 3):  # one after the other, from the same snapshot
            home.home_state.adopt(sequence, 1, SHARED)
            home.reserve(sequence, SHARED, PROMPT + NEW)
            placement = (Span("w1", 0, 24, 1), Span("w0", 24, SHARED, 1), Span("w0", SHARED, PROMPT + NEW))
            gang = made.gang("w0", ["w1"])
            chunk = PrefillChunk(gang, sequence, placement, SHARED, tuple(prompt_ids(PROMPT)[SHARED:]), GREEDY)
            first = made.run(gang, lambda runtime, chunk=chunk: runtime.prefill(chunk)).token
            result, _ = made.decode("w0", [state(sequence, placement, PROMPT, first, NEW - 1)], NEW)
            assert [first, *result.tokens[sequence]] == reference(family).tokens
        for sequence in (1, 2, 3):
            made.release_sequence(sequence)
        assert home.home_state.windows is None or not home.home_state.windows.pool.used_blocks
        home.home_state.adopt(4, 1, SHARED)
        with pytest.raises(StateLostError):
            made.decode("w0", [state(4, source, SHARED, 1, 5)], 1)


@pytest.mark.parametrize("family", ["lfm2", "gemma2"])
def test_no_snapshot_is_taken_where_it_is_not_wanted_any_more(family: str) -> None:
    with fleet(loaded(family), 1) as made:
        placement, home = made.place(1, ("w0", 48)), made.members["w0"].runtime.home_state
        home.keep(1, (32,), ended=False)  # while the chunks wait
        for start in (0, 16, 32):
            gang = made.gang("w0", [])
            chunk = PrefillChunk(gang, 1, placement, start, tuple(prompt_ids(16)), snapshot=True)
            made.run(gang, lambda runtime, chunk=chunk: runtime.prefill(chunk))
        for number, length, there in ((2, 16, False), (3, 32, True)):
            home.adopt(number, 1, length)
            if there:
                made.decode("w0", [state(number, made.place(number, ("w0", 48)), length, 1, 5)], 1)
            else:
                with pytest.raises(StateLostError):
                    made.decode("w0", [state(number, made.place(number, ("w0", 48)), length, 1, 5)], 1)
