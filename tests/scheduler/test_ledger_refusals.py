"""Refusals of the ledger change nothing, and a request is given up only after it was set aside long enough."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
from _happenings import ONE
from _situations import waiting

from distkv_dask.errors import CapacityError
from distkv_dask.placement import Endpoint, Move, Span
from distkv_dask.scheduler.ledger.invariants import check_ledger
from distkv_dask.scheduler.ledger.ledger import Ledger

BLOCK = 4


def lending() -> Ledger:
    """A document, a question on it, and a sequence of which blocks are being moved."""
    ledger = Ledger(BLOCK)
    for name, capacity in (("a", 6), ("b", 6), ("c", 3)):
        ledger.add_worker(Endpoint(name, "host", 1), capacity, lend_limit=4)
    ledger.reserve(1, (Span("a", 0, 8), Span("b", 8, 16)), 16, idle=True)
    ledger.commit(1, 16)
    ledger.reserve(2, (Span("a", 0, 8, document=1), Span("b", 8, 14)))
    ledger.commit(2, 11)
    ledger.reserve(3, (Span("a", 0, 8), Span("b", 8, 12)))
    ledger.commit(3, 9)
    ledger.start_move(Move(3, 0, 4, "a", "c"))
    return ledger


REFUSED: dict[str, Callable[[Ledger], object]] = {
    "a worker that is not there": lambda ledger: ledger.reserve(9, (Span("z", 0, 4),)),
    "more than is free": lambda ledger: ledger.reserve(9, (Span("c", 0, 4), Span("b", 4, 40))),
    "spans of a document that lie elsewhere": lambda ledger: ledger.reserve(
        9, (Span("b", 0, 8, document=1), Span("b", 8, 12))
    ),
    "more of a document than is stored": lambda ledger: ledger.reserve(
        9, (Span("a", 0, 8, document=2), Span("b", 8, 14, document=2), Span("c", 14, 15))
    ),
    "a document whose blocks move": lambda ledger: ledger.reserve(9, (Span("a", 0, 8, document=3), Span("c", 8, 9))),
    "keeping what is shared": lambda ledger: ledger.make_document(1, 8),
    "keeping what moves": lambda ledger: ledger.make_document(3, 8),
    "keeping a part of a block": lambda ledger: ledger.make_document(2, 9),
    "keeping more than is there": lambda ledger: ledger.make_document(2, 12),
    "mending what is shared": lambda ledger: ledger.replace_lost(1, (Span("c", 0, 16),)),
    "mending what moves": lambda ledger: ledger.replace_lost(3, (Span("c", 0, 12),)),
    "a larger document than there is room for": lambda ledger: ledger.resize(1, (Span("a", 0, 8), Span("b", 8, 60))),
    "releasing what is shared": lambda ledger: ledger.release_sequence(1),
    "moving what is shared": lambda ledger: ledger.start_move(Move(1, 0, 4, "a", "c")),
    "moving to a worker without room": lambda ledger: ledger.start_move(Move(2, 8, 14, "b", "z")),
    "moving what moves already": lambda ledger: ledger.start_move(Move(3, 0, 8, "a", "b")),
    "moving what lies elsewhere": lambda ledger: ledger.start_move(Move(3, 0, 4, "b", "c")),
    "moving a part of a block": lambda ledger: ledger.start_move(Move(3, 4, 6, "a", "c")),
    "moving to where it lies": lambda ledger: ledger.start_move(Move(3, 4, 8, "a", "a")),
    "ending a move that never began": lambda ledger: ledger.finish_move(Move(3, 4, 8, "a", "c")),
}


def everything(ledger: Ledger) -> tuple[object, ...]:
    return copy.deepcopy((ledger.epoch, ledger.workers, ledger.sequences, ledger.moves, ledger.owes))


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_changes_nothing(what: str) -> None:
    ledger = lending()
    before = everything(ledger)
    with pytest.raises(ValueError, match=r"\w"):
        REFUSED[what](ledger)
    assert everything(ledger) == before
    check_ledger(ledger)


def test_a_move_that_is_over_can_be_cancelled_again() -> None:
    ledger = lending()
    move = Move(3, 0, 4, "a", "c")
    ledger.cancel_move(move)
    after = everything(ledger)
    ledger.cancel_move(move)
    assert everything(ledger) == after
    assert ledger.workers["c"].used == 0


def test_holders_are_those_with_tokens_before_a_position() -> None:
    ledger = lending()
    placement = (Span("a", 0, 8), Span("b", 8, 8), Span("c", 8, 12))
    assert [one.worker for one in ledger.holders(placement)] == ["a", "c"]
    assert [one.worker for one in ledger.holders(placement, 8)] == ["a"]
    assert [one.worker for one in ledger.holders(placement, 9)] == ["a", "c"]
    assert [one.worker for one in ledger.holders(placement, but="a")] == ["c"]


def test_the_time_for_which_a_request_is_set_aside_begins_anew_each_time() -> None:
    cluster = waiting()
    limit = cluster.life.config.timeout_open

    def aside(seconds: float) -> bool:
        """Leave it set aside for this time; returns whether it still waits."""
        cluster.drain("w1")
        cluster.tick()
        cluster.now += seconds
        cluster.tick()
        return ONE in cluster.life.requests

    for _ in range(3):
        assert aside(limit - 1)
        cluster.drain("w1", False)
        cluster.tick()
        assert not cluster.life.queue.aside(cluster.life.queue.ask(ONE))
    assert not aside(limit + 1)
    reason, error = cluster.ends[ONE]
    assert reason == "error"
    assert isinstance(error, CapacityError)
