"""Progress of chunks that others follow: nothing is read before it is stored, and every waiter is notified."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from _examples import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from distkv_dask.errors import GangAbortedError
from distkv_dask.worker import under_way
from distkv_dask.worker.showing import Showing
from distkv_dask.worker.under_way import UnderWay


class Mark:
    """A point in a card's stream, and how often the host waited for it."""

    def __init__(self) -> None:
        self.waits = 0

    def wait(self) -> None:
        self.waits += 1


class Following(RuleBasedStateMachine):
    """Chunks that begin, store, end and fail in any order, compared with plain sets."""

    def __init__(self) -> None:
        super().__init__()
        self.made = UnderWay()
        self.layers: dict[int, set[int]] = {}
        self.complete: set[int] = set()
        self.failed: dict[int, str] = {}
        self.awaited = False

    gangs, layers_of = st.integers(1, 4), st.integers(0, 3)

    def expect_news(self, told: bool) -> None:
        assert told == self.awaited
        self.awaited = False

    @rule(gang=gangs, layer=layers_of)
    def store(self, gang: int, layer: int) -> None:
        self.layers.setdefault(gang, set()).add(layer)
        self.failed.pop(gang, None)
        self.expect_news(self.made.stored(gang, layer, Mark()))  # type: ignore[arg-type]

    @rule(gang=gangs)
    def compute(self, gang: int) -> None:
        self.complete.add(gang)
        self.expect_news(self.made.computed(gang))

    @rule(gang=gangs)
    def fail(self, gang: int) -> None:
        self.failed[gang] = f"fault {gang}"
        self.expect_news(self.made.failed(gang, f"fault {gang}"))

    @rule(gang=gangs, layer=layers_of)
    def look(self, gang: int, layer: int) -> None:
        if gang in self.failed:
            with pytest.raises(GangAbortedError, match=f"gang {gang}, which this one follows, failed: fault {gang}"):
                self.made.is_stored(gang, layer)
            return
        there = gang in self.complete or layer in self.layers.get(gang, ())
        assert self.made.is_stored(gang, layer) == there
        self.awaited |= not there

    @rule(gang=gangs)
    def begin_behind(self, gang: int) -> None:
        assert self.made.is_computed(gang) == (gang in self.complete)
        if gang in self.complete:
            self.made.check_computed([gang])
        else:
            with pytest.raises(GangAbortedError, match=f"gang {gang}, which this one follows, was not completed here"):
                self.made.check_computed([*self.complete, gang])


TestFollowing = Following.TestCase
TestFollowing.settings = settings(max_examples=examples(60), stateful_step_count=25, deadline=None)


def test_the_host_waits_for_the_card_before_it_reads_a_layer() -> None:
    made, mark = UnderWay(), Mark()
    made.stored(1, 0, mark)  # type: ignore[arg-type]
    assert mark.waits == 0, "the home lane must not wait"
    assert made.is_stored(1, 0)
    assert mark.waits == 1
    made.computed(1)
    assert made.is_stored(1, 0)
    assert mark.waits == 1, "a chunk that is complete was waited for where it was computed"


def test_a_chunk_that_failed_is_not_read_though_it_was_complete_before() -> None:
    made = UnderWay()
    made.computed(1)
    made.failed(1, "the card failed")
    with pytest.raises(GangAbortedError, match="the card failed"):
        made.is_stored(1, 0)


def test_others_go_on_while_one_waits_for_the_card() -> None:
    made, reached, leave = UnderWay(), threading.Event(), threading.Event()
    slow: Any = SimpleNamespace(wait=lambda: (reached.set(), leave.wait(20)))
    made.stored(1, 0, slow)
    waiting = threading.Thread(target=made.is_stored, args=(1, 0))
    waiting.start()
    assert reached.wait(20)
    made.stored(1, 1, Mark())  # type: ignore[arg-type]  # would block if the lock were held
    assert made.is_stored(1, 1)
    leave.set()
    waiting.join(20)


def test_only_the_latest_chunks_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_way, "REMEMBERED", 3)
    made = UnderWay()
    for gang in range(1, 6):
        made.computed(gang)
    made.computed(5)
    assert [made.is_computed(gang) for gang in range(1, 6)] == [False, False, True, True, True]
    made.failed(3, "late")
    assert made.is_computed(4), "a known chunk takes nobody's place"


def test_a_follower_in_another_thread_reads_no_layer_too_early() -> None:
    """The home lane stores and notifies; the holder lane looks again only when it is notified."""
    layers, made = 200, UnderWay()
    kept: list[int] = []
    news = threading.Semaphore(0)

    def home() -> None:
        for layer in range(layers):
            kept.append(layer)
            if made.stored(1, layer, Mark()):  # type: ignore[arg-type]
                news.release()
        if made.computed(1):
            news.release()

    writer = threading.Thread(target=home)
    writer.start()
    for layer in range(layers):
        while not made.is_stored(1, layer):
            assert news.acquire(timeout=20), "whoever waits must be told"
        assert layer in kept
    writer.join(20)


# The home lane's progress


class Lane:
    """A holder lane that records the engines for which it looks again."""

    def __init__(self) -> None:
        self.woken: list[str] = []

    def go_on(self, engine: str) -> None:
        self.woken.append(engine)


def shown(under: UnderWay, lane: Lane, *gangs: int) -> tuple[Showing, list[Mark]]:
    marks: list[Mark] = []

    def mark() -> Mark:
        marks.append(Mark())
        return marks[-1]

    device: Any = SimpleNamespace(mark=mark)
    return Showing(gangs, under, lane, "engine", device), marks  # type: ignore[arg-type]


def test_all_chunks_of_a_forward_are_shown_behind_one_mark() -> None:
    under, lane = UnderWay(), Lane()
    showing, marks = shown(under, lane, 1, 2)
    showing.stored(0)
    assert len(marks) == 1
    assert under.is_stored(1, 0)
    assert under.is_stored(2, 0)
    assert marks[0].waits == 2
    assert not under.is_computed(1)
    showing.computed()
    assert under.is_computed(1)
    assert under.is_computed(2)


ENDS: dict[str, Callable[[Showing], None]] = {
    "stored": lambda showing: showing.stored(3),
    "computed": lambda showing: showing.computed(),
    "failed": lambda showing: showing.failed("a fault"),
}


@pytest.mark.parametrize("news", ENDS)
def test_the_holder_lane_is_woken_once_if_it_waits(news: str) -> None:
    under, lane = UnderWay(), Lane()
    showing, _ = shown(under, lane, 1, 2, 3)
    ENDS[news](showing)
    assert lane.woken == [], "nobody waits: a step of another home is not disturbed"
    other, _ = shown(under, lane, 7, 8)
    assert not under.is_stored(7, 3)
    ENDS[news](other)
    assert lane.woken == ["engine"]
    ENDS[news](other)
    assert lane.woken == ["engine"]


def test_who_follows_a_chunk_that_failed_with_others_goes_on_when_it_is_computed_alone() -> None:
    under, lane = UnderWay(), Lane()
    together, _ = shown(under, lane, 1, 2)
    together.failed("out of memory")
    for gang in (1, 2):
        with pytest.raises(GangAbortedError, match="out of memory"):
            under.is_stored(gang, 0)
    alone, _ = shown(under, lane, 1)
    alone.stored(0)
    assert under.is_stored(1, 0)
    with pytest.raises(GangAbortedError):
        under.is_stored(2, 0)
