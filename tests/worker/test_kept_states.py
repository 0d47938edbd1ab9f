"""States at homes, alone and with windows, in any order of work, compared with plain dictionaries."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _examples import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from distkv_dask.errors import StateLostError
from distkv_dask.geometry import Geometry, LayerKind
from distkv_dask.worker.blocks.pool import BlockShape, Pool
from distkv_dask.worker.home.home_state import Begun, Ended, HomeState
from distkv_dask.worker.home.states import States
from distkv_dask.worker.home.windows import Windows, blocks_per_chunk, blocks_per_sequence

BLOCK, CHUNK, WINDOW = 4, 16, 6


def state(value: int) -> Any:
    return {"slot": torch.tensor([value])}


class Keeping(RuleBasedStateMachine):
    """Sequences that run, are retried, adopted, kept and dropped; a state is the number of tokens that it includes."""

    def __init__(self) -> None:
        super().__init__()
        self.made = States()
        self.kept: dict[int, dict[int, Any]] = {}
        self.snapshots: dict[int, dict[int, Any]] = {}
        self.count = 0

    sequences, lengths = st.integers(1, 4), st.integers(1, 5)

    @rule(sequence=sequences, length=st.integers(0, 5))
    def begin(self, sequence: int, length: int) -> None:
        if not length:
            assert self.made.begin_run(sequence, 0) == {}
            self.kept.pop(sequence, None)
        elif length in self.kept.get(sequence, {}):
            found = self.kept[sequence][length]
            assert self.made.begin_run(sequence, length) is found
            self.kept[sequence] = {length: found}
        else:
            with pytest.raises(StateLostError, match=f"sequence {sequence} after {length} tokens") as caught:
                self.made.begin_run(sequence, length)
            assert caught.value.sequence == sequence

    @rule(sequence=sequences, length=lengths)
    def put(self, sequence: int, length: int) -> None:
        self.count += 1
        self.kept.setdefault(sequence, {})[length] = made = state(self.count)
        self.made.put(sequence, length, made)

    @rule(sequence=sequences, length=lengths)
    def snapshot(self, sequence: int, length: int) -> None:
        if length not in self.kept.get(sequence, {}):
            with pytest.raises(StateLostError):
                self.made.snapshot(sequence, length)
            return
        self.made.snapshot(sequence, length)
        self.snapshots.setdefault(sequence, {})[length] = self.kept[sequence][length]

    @rule(sequence=sequences, source=sequences, length=lengths)
    def adopt(self, sequence: int, source: int, length: int) -> None:
        before = self.kept.get(source, {}).get(length, self.snapshots.get(source, {}).get(length))
        self.made.adopt(sequence, source, length)
        if before is not None:
            self.kept[sequence] = {length: before}

    @rule(sequence=sequences, lengths=st.sets(lengths), ended=st.booleans())
    def keep(self, sequence: int, lengths: set[int], ended: bool) -> None:
        self.made.keep(sequence, lengths, ended)
        left = {at: one for at, one in self.snapshots.pop(sequence, {}).items() if at in lengths}
        if left:
            self.snapshots[sequence] = left
        if ended:
            self.kept.pop(sequence, None)
        assert self.made.sequences() == {*self.snapshots, *(one for one in self.kept)}

    def teardown(self) -> None:
        for sequence in range(1, 5):
            self.made.drop(sequence)
        assert self.made.sequences() == set()


TestKeeping = Keeping.TestCase
TestKeeping.settings = settings(max_examples=examples(80), stateful_step_count=25, deadline=None)


# With windows


class Home:
    """A home of a model with recurrent layers and windows, with the data of its sequences."""

    def __init__(self, states: bool, windows: bool) -> None:
        kinds = (LayerKind("sliding", WINDOW), LayerKind()) if windows else (LayerKind(),)
        self.geometry = Geometry(len(kinds), 1, 1, 8, 10, 0, "float32", kinds, state_bytes=8 * states)
        self.pool: Pool | None = None
        kept = None
        if windows:
            each = blocks_per_sequence(self.geometry, BLOCK, CHUNK)
            shape = BlockShape.of(self.geometry, BLOCK, self.geometry.home_layers)
            self.pool = Pool(shape, 3 * each + blocks_per_chunk(BLOCK, CHUNK))
            kept = Windows(self.geometry, self.pool, "w0", CHUNK)
        self.made, self._states = HomeState(kept), states
        self.begun: list[Any] = []
        self.model: Any = SimpleNamespace(geometry=self.geometry, past=self._past)

    def _past(self, states: list[Any]) -> str:
        self.begun.append(states)
        return "past"

    def run(self, sequence: int, length: int, count: int, snapshot: bool = False, value: int = 0) -> Any:
        """Compute ``count`` tokens of a sequence."""
        with self.made.change(self.model, [Begun(sequence, length, length + count)]) as change:
            after = state(value) if self._states else None
            change.after = [Ended(sequence, length + count, after, snapshot)]
        return change.past

    def goes_on(self, sequence: int, length: int) -> bool:
        try:
            self.run(sequence, length, 1)
        except StateLostError:
            return False
        return True


ALL = pytest.mark.parametrize(("states", "windows"), [(True, False), (False, True), (True, True)])


@ALL
def test_what_fails_leaves_what_it_began_with(states: bool, windows: bool) -> None:
    home = Home(states, windows)
    home.run(1, 0, 8, value=5)

    def fail() -> None:
        with home.made.change(home.model, [Begun(1, 8, 12)]) as change:
            change.after = [Ended(1, 12, state(6) if states else None)]
            raise ValueError("a fault")

    with pytest.raises(ValueError, match="a fault"):
        fail()
    assert not home.goes_on(1, 12)
    assert home.goes_on(1, 8)


@ALL
def test_a_sequence_goes_on_from_what_is_committed_alone(states: bool, windows: bool) -> None:
    home = Home(states, windows)
    assert home.run(1, 0, 8, value=5) == ("past" if states else None)
    home.run(1, 8, 4, value=6)
    assert home.begun == ([[{}], [state(5)]] if states else [])
    assert home.goes_on(1, 12)
    assert not home.goes_on(1, 8), "it went on from 12"
    assert not home.goes_on(2, 12)


@ALL
def test_snapshots_are_for_others_until_nobody_wants_them(states: bool, windows: bool) -> None:
    home = Home(states, windows)
    home.run(1, 0, 8, snapshot=True, value=5)
    home.run(1, 8, 4, snapshot=True, value=6)
    home.run(1, 12, 4, value=7)
    home.made.keep(1, (8, 12), ended=True)
    assert not home.goes_on(1, 16)
    for other, length in ((2, 8), (3, 12)):
        home.made.adopt(other, 1, length)
        assert home.goes_on(other, length)
        home.made.drop(other)
    home.made.keep(1, (12,), ended=False)
    home.made.adopt(2, 1, 8)
    assert not home.goes_on(2, 8)
    home.made.drop(1)
    home.made.adopt(2, 1, 12)
    assert not home.goes_on(2, 12)
    home.made.drop(2)
    if home.pool is not None:
        assert home.pool.used_blocks == 0


@ALL
@pytest.mark.parametrize(("wanted", "taken"), [(None, True), ((8,), True), ((), False), ((4,), False)])
def test_what_the_gmanager_said_last_holds_for_chunks_planned_before(
    states: bool, windows: bool, wanted: tuple[int, ...] | None, taken: bool
) -> None:
    home = Home(states, windows)
    if wanted is not None:
        home.made.keep(1, wanted, ended=False)
    home.run(1, 0, 8, snapshot=True)
    home.run(1, 8, 8)
    home.run(1, 16, 1)
    home.made.adopt(2, 1, 8)
    assert home.goes_on(2, 8) == taken


@ALL
def test_a_new_sequence_of_an_old_number_has_its_own_wishes(states: bool, windows: bool) -> None:
    home = Home(states, windows)
    home.made.keep(1, (), ended=False)
    home.made.keep(1, (), ended=True)
    home.run(1, 0, 8, snapshot=True)
    home.run(1, 8, 8)
    home.run(1, 16, 1)
    home.made.adopt(2, 1, 8)
    assert home.goes_on(2, 8)


@pytest.mark.parametrize(("steps", "most"), [(None, 64), (100, 64), (7, 7)])
def test_windows_bound_the_steps_of_a_decode_window(steps: int | None, most: int) -> None:
    kinds = (LayerKind("sliding", WINDOW), LayerKind())
    geometry = Geometry(2, 1, 1, 8, 10, 0, "float32", kinds)
    pool = Pool(BlockShape.of(geometry, BLOCK, geometry.home_layers), 40)
    assert HomeState(Windows(geometry, pool, "w0", 512)).most_steps(steps) == most
    assert HomeState().most_steps(steps) == steps
