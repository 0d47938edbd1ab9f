"""Admission: the order of requests, expected room, and placement of documents and questions on them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import ClassVar

import pytest

from distkv_dask.placement import Endpoint, Placement, Span
from distkv_dask.scheduler.costs.presets import PRESETS
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.policies import policy_named
from distkv_dask.scheduler.policies.base import Ask
from distkv_dask.scheduler.policies.local_only import LocalOnly
from distkv_dask.scheduler.policies.queue import Queue
from distkv_dask.scheduler.policies.shared_prefix import HEADROOM, place

BLOCK = 4
MODEL = PRESETS["cpu-smollm2"].model


class Watched(LocalOnly):
    """A policy that records its calls, and has room for small requests only."""

    look_ahead = 3
    asked: ClassVar[list[tuple[int, int | None]]] = []

    def place(self, ledger: Ledger, ask: Ask, ahead: Ask | None = None) -> Placement | None:
        self.asked.append((ask.sequence, None if ahead is None else ahead.sequence))
        return (Span("w0", 0, ask.tokens),) if ask.tokens < BLOCK else None


def test_those_behind_the_first_that_does_not_fit_are_asked_with_that_one_ahead_and_only_so_many() -> None:
    ledger = Ledger(BLOCK)
    ledger.add_worker(Endpoint("w0", "host", 1), 50)
    Watched.asked = []
    queue = Queue(ledger, Watched(MODEL))
    for number in range(6):
        queue.enqueue(Ask(number, 1, 10 * BLOCK, float(number)))
    assert queue.choose() is None
    assert Watched.asked == [(0, None), (1, 0), (2, 0), (3, 0)]
    queue.enqueue(Ask(9, 1, 1, 1.5))
    assert queue.choose() == (Ask(9, 1, 1, 1.5), (Span("w0", 0, 1),))
    assert [ask.sequence for ask in queue] == [0, 1, 2, 3, 4, 5]
    assert 9 not in queue


def test_what_is_held_is_counted_at_once_and_no_more_once_it_is_free() -> None:
    ledger = Ledger(BLOCK)
    ledger.add_worker(Endpoint("w0", "host", 1), 10)
    queue = Queue(ledger, policy_named("overflow", MODEL))
    queue.enqueue(ask := Ask(0, 1, 8 * BLOCK))
    for held, limit in (({}, 10), ({"w0": 5}, 5), ({"w0": 2}, 8), ({}, 10)):
        queue.hold(held)
        assert queue.limit == limit
        assert bool(queue.aside(ask)) == (limit < 8)
        assert [one.sequence for one in queue.turns()] == ([0] if limit >= 8 else [])


# Documents and questions on them


def documented(free: Mapping[str, int], sharers: Mapping[str, int], homed: int = 0) -> Ledger:
    """A document that ends on w2, and numbers of questions on it that decode on each worker."""
    ledger, numbers = Ledger(BLOCK, batch=4), itertools.count(10)
    for name, room in free.items():
        ledger.add_worker(Endpoint(name, "host", 1), room + 20)
    ledger.reserve(0, (Span("w1", 0, 8), Span("w2", 8, 16)), 16, idle=True)
    ledger.commit(0, 16)
    shared = (Span("w1", 0, 8, document=0), Span("w2", 8, 16, document=0))
    for name, count in sharers.items():
        for _ in range(count):
            ledger.reserve(next(numbers), (*shared, Span(name, 16, 18)))
    for name, room in free.items():
        blocks = ledger.workers[name].free - room
        ledger.reserve(next(numbers), (Span(name, 0, blocks * BLOCK),), idle=True)
    return ledger


@pytest.mark.parametrize(
    ("free", "sharers", "leaving", "home"),
    [
        ({"w0": 9, "w1": 9, "w2": 5}, {}, (), "w2"),  # where the document ends
        ({"w0": 9, "w1": 9, "w2": 5}, {"w0": 1, "w1": 2}, (), "w1"),  # where most questions on it decode
        ({"w0": 9, "w1": 1, "w2": 5}, {"w0": 1, "w1": 2}, (), "w0"),  # where there also is room
        ({"w0": 9, "w1": 9, "w2": 5}, {"w0": 1, "w1": 2}, ("w1",), "w0"),  # not on one that leaves
        ({"w0": 9, "w1": 9, "w2": 5}, {"w1": 4}, (), "w2"),  # not in a full batch
        ({"w0": 9, "w1": 1, "w2": 1}, {}, (), "w0"),  # where the policy would place any request
    ],
)
def test_a_question_decodes_where_others_share_its_steps(
    free: dict[str, int], sharers: dict[str, int], leaving: tuple[str, ...], home: str
) -> None:
    ledger = documented(free, sharers)
    for worker in leaving:
        ledger.retire_worker(worker)
    ask = Ask(1, 4, 3 * BLOCK, document=0, shared=16)
    placement = place(ledger, policy_named("overflow", MODEL), ask)
    assert placement is not None
    assert placement[:2] == (Span("w1", 0, 8, document=0), Span("w2", 8, 16, document=0))
    assert placement[2:] == (Span(home, 16, 16 + 3 * BLOCK),)


def test_a_documents_home_keeps_room_for_questions_where_there_is_any() -> None:
    tokens = 20 * BLOCK
    for room, spare in ((20, 0), (20 + HEADROOM // BLOCK, HEADROOM // BLOCK)):
        ledger = Ledger(BLOCK)
        ledger.add_worker(Endpoint("w0", "host", 1), 21)
        ledger.add_worker(Endpoint("w1", "host", 1), room + 2)
        placement = place(ledger, policy_named("overflow", MODEL), Ask(0, tokens, tokens, is_document=True))
        assert placement is not None
        assert placement[-1].stop == tokens
        home = ledger.workers[placement[-1].worker]
        assert home.free - -(-placement[-1].tokens // BLOCK) >= spare
