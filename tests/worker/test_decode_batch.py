"""Sequences of a home join, move, leave and decode in any order: windows take those that are ready, and commit once."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from _examples import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from distkv_dask.adapter import Adapter
from distkv_dask.errors import GangAbortedError
from distkv_dask.gang import DecodeWindow, Gang, SequenceState, WindowResult
from distkv_dask.placement import Endpoint, Placement, Span
from distkv_dask.sampling import SamplingParams
from distkv_dask.worker import decode_batch
from distkv_dask.worker.decode_batch import DecodeBatch

HOLDERS = {name: Endpoint(name, "host", port) for port, name in enumerate(("w1", "w2", "w3"), 1)}
ALL = tuple(HOLDERS.values())
PLAIN, SCHEMA = SamplingParams(), SamplingParams(regex="[0-9]+")


class Model:
    """Compiles nothing by itself."""

    def __init__(self) -> None:
        self.prepared: set[str | None] = {None}

    def is_prepared(self, sampling: SamplingParams, adapter: Adapter | None = None) -> bool:
        return sampling.regex in self.prepared


def batch_of(granularity: str = "window", most: int = 4, model: Model | None = None) -> DecodeBatch:
    spec: Any = SimpleNamespace(config=SimpleNamespace(granularity=granularity, window_batch=most, adapters=2))
    return DecodeBatch(spec, model or Model())  # type: ignore[arg-type]


def state(sequence: int, length: int = 10, sampling: SamplingParams = PLAIN) -> SequenceState:
    return SequenceState(sequence, (Span("w0", 0, 64),), length, 7, 50, sampling, generated=(7,))


def window(epoch: int = 0, holders: tuple[Endpoint, ...] = ALL) -> DecodeWindow:
    return DecodeWindow(Gang("engine", 1, "gang-1", epoch, "w0", holders), 3, 8, 1.0)


def generated(tokens: dict[int, list[int]], *finished: int) -> WindowResult:
    return WindowResult(tokens, dict.fromkeys(finished, "stop"), 4, 0.1)


def taken(made: DecodeBatch, epoch: int = 0, holders: tuple[Endpoint, ...] = ALL) -> list[int]:
    return [one.sequence for one in made.of_window(window(epoch, holders))[0]]


class Decoding(RuleBasedStateMachine):
    """A home's sequences compared with plain dictionaries of their states and data."""

    def __init__(self) -> None:
        super().__init__()
        self.made, self.epoch = batch_of(most=3), 0
        self.states: dict[int, SequenceState] = {}
        self.holders: dict[int, tuple[str, ...]] = {}
        self.running: tuple[DecodeWindow, list[SequenceState]] | None = None

    @rule(sequence=st.integers(0, 5), length=st.integers(1, 40), holders=st.sets(st.sampled_from(sorted(HOLDERS))))
    def join(self, sequence: int, length: int, holders: set[str]) -> None:
        self.states.setdefault(sequence, state(sequence))  # a sequence that joins again keeps its place
        self.states[sequence] = state(sequence, length)
        self.holders[sequence] = tuple(sorted(holders))
        self.made.join(self.states[sequence], tuple(HOLDERS[one] for one in self.holders[sequence]))

    @rule(sequence=st.integers(0, 5))
    def leave(self, sequence: int) -> None:
        self.states.pop(sequence, None)
        self.made.leave(sequence)

    @rule(sequence=st.integers(0, 5), stop=st.integers(64, 99), holder=st.sampled_from(sorted(HOLDERS)))
    def relocate(self, sequence: int, stop: int, holder: str) -> None:
        placement: Placement = (Span(holder, 0, 64), Span("w0", 64, stop))
        self.made.relocate(sequence, placement, (HOLDERS[holder],))
        if sequence in self.states:
            self.states[sequence] = replace(self.states[sequence], placement=placement)
            self.holders[sequence] = (holder,)

    @rule()
    def reset(self) -> None:
        self.epoch += 1
        self.made.reset(self.epoch)
        self.states.clear()

    @rule(past=st.booleans())
    def begin(self, past: bool) -> None:
        asked = window(self.epoch - past)
        batch, holders = self.made.of_window(asked)
        if past:
            assert (batch, holders) == ([], ())
            return
        expected = list(self.states.values())[:3]
        assert batch == expected
        assert {one.worker for one in holders} == {name for one in expected for name in self.holders[one.sequence]}
        assert len(holders) == len({*holders})
        self.running = asked, batch

    @precondition(lambda self: self.running is not None)
    @rule(counts=st.lists(st.integers(1, 3), min_size=3, max_size=3), ends=st.sets(st.integers(0, 5)))
    def commit(self, counts: list[int], ends: set[int]) -> None:
        assert self.running is not None
        (asked, batch), self.running = self.running, None
        tokens = {one.sequence: [*range(100, 100 + count)] for one, count in zip(batch, counts, strict=False)}
        finished = [one.sequence for one in batch if one.sequence in ends]
        result = generated(tokens, *finished)
        if asked.gang.epoch != self.epoch:
            with pytest.raises(GangAbortedError, match="superseded"):
                self.made.commit(asked, batch, result)
            return
        self.made.commit(asked, batch, result)
        for before in batch:
            now = self.states.get(before.sequence)
            if now is None:
                continue
            if before.sequence in finished:
                del self.states[before.sequence]
                continue
            new = tokens[before.sequence]
            self.states[before.sequence] = replace(
                before,
                placement=now.placement,
                length=before.length + len(new),
                last_token=new[-1],
                remaining=before.remaining - len(new),
                generated=(*before.generated, *new),
            )

    @invariant()
    def those_that_are_ready_are_known(self) -> None:
        batch, _ = self.made.of_window(window(self.epoch))
        assert batch == list(self.states.values())[:3]
        assert self.made.needs() == [(PLAIN, None)] * len(self.states)


TestDecoding = Decoding.TestCase
TestDecoding.settings = settings(max_examples=examples(60), stateful_step_count=25, deadline=None)


def test_a_sequence_waits_until_its_form_is_compiled_and_keeps_nobody_waiting() -> None:
    model = Model()
    made = batch_of(model=model)
    made.join(state(1, sampling=SCHEMA), ())
    made.join(state(2), ())
    assert taken(made) == [2]
    assert made.needs() == [(SCHEMA, None), (PLAIN, None)]
    model.prepared.add(SCHEMA.regex)
    assert taken(made) == [1, 2]


@pytest.mark.parametrize(("granularity", "expected"), [("window", [1, 2, 3]), ("layer", [1, 2]), ("step", [1, 2])])
def test_a_window_takes_no_sequence_whose_holders_have_no_task(granularity: str, expected: list[int]) -> None:
    made = batch_of(granularity)
    made.join(state(1), ())
    made.join(state(2), (HOLDERS["w1"],))
    made.join(state(3), (HOLDERS["w1"], HOLDERS["w2"]))
    assert taken(made, holders=(HOLDERS["w1"], HOLDERS["w3"])) == expected


def test_a_window_is_no_larger_than_the_settings_say_and_first_come_are_first() -> None:
    made = batch_of(most=2)
    for sequence in (5, 3, 4):
        made.join(state(sequence), ())
    assert taken(made) == [5, 3]
    made.leave(5)
    assert taken(made) == [3, 4]


def test_holders_of_a_window_are_those_of_its_sequences_alone() -> None:
    made = batch_of(most=1)
    made.join(state(1), (HOLDERS["w2"],))
    made.join(state(2), (HOLDERS["w3"],))
    assert made.of_window(window())[1] == (HOLDERS["w2"],)


def test_a_sequence_that_left_while_it_ran_stays_away() -> None:
    made = batch_of()
    made.join(state(1), ())
    batch, _ = made.of_window(window())
    made.leave(1)
    made.commit(window(), batch, generated({1: [8, 9]}))
    assert taken(made) == []


def test_a_sequence_that_moved_while_it_ran_goes_on_where_it_is_now() -> None:
    made = batch_of()
    made.join(state(1), ())
    batch, _ = made.of_window(window())
    placement = (Span("w1", 0, 64), Span("w0", 64, 99))
    made.relocate(1, placement, (HOLDERS["w1"],))
    made.commit(window(), batch, generated({1: [8]}))
    (now,), holders = made.of_window(window())
    assert (now.placement, now.length, holders) == (placement, 11, (HOLDERS["w1"],))


def test_a_window_of_an_old_epoch_changes_nothing_and_names_itself() -> None:
    made = batch_of()
    made.join(state(1), ())
    batch, _ = made.of_window(window())
    made.reset(1)
    made.join(state(1, length=33), ())
    with pytest.raises(GangAbortedError, match="window gang-1 was superseded by a newer placement"):
        made.commit(window(), batch, generated({1: [8, 9]}))
    (now,) = made.of_window(window(1))[0]
    assert (now.length, now.generated) == (33, (7,))


def test_the_time_between_windows_counts_while_there_is_something_to_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 13.5, 20.0, 21.0])
    monkeypatch.setattr(decode_batch.time, "perf_counter", lambda: next(clock))  # type: ignore[attr-defined]
    made = batch_of()
    assert made.gap() == 0.0, "there was no window yet"
    for sequence in (1, 2):
        made.join(state(sequence), ())
    batch, _ = made.of_window(window())
    made.commit(window(), batch, generated({1: [8], 2: [8]}, 1))
    assert made.gap() == 3.5
    batch, _ = made.of_window(window())
    made.commit(window(), batch, generated({2: [9]}, 2))
    assert made.gap() == 0.0, "nobody waited"
    made.join(state(3), ())
    batch, _ = made.of_window(window())
    made.commit(window(), batch, generated({3: [9]}))
    assert made.gap() == 1.0
    made.reset(1)
    assert made.gap() == 0.0


def test_a_window_takes_no_more_adapters_than_are_kept_in_memory_and_those_of_one_lie_together() -> None:
    made = batch_of(most=9)
    one, two, three = (Adapter(f"/{name}", name) for name in ("b", "a", "c"))
    for sequence, adapter in enumerate((one, None, two, one, three, None, two)):
        made.join(replace(state(sequence), adapter=adapter), ())
    assert taken(made) == [1, 5, 2, 6, 0, 3], "those of the first two adapters; others wait"
    for sequence in (0, 3):
        made.leave(sequence)
    assert taken(made) == [1, 5, 2, 6, 4]
