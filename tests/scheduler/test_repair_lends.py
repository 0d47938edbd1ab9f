"""Repair respects lend limits, and recalls find the creditor that would then just have room."""

from __future__ import annotations

from array import array

import pytest

from distkv_dask.placement import Endpoint, Move, Span
from distkv_dask.sampling import SamplingParams
from distkv_dask.scheduler.cache.repair import placement_without_losses
from distkv_dask.scheduler.costs.presets import PRESET
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.policies import policy_named
from distkv_dask.scheduler.policies.balance import recalls
from distkv_dask.scheduler.policies.base import Ask
from distkv_dask.scheduler.records.request import Asked, Request

BLOCK = 4


@pytest.mark.parametrize(("lends", "fits"), [(3, True), (2, False)])
def test_a_holder_that_is_lost_is_replaced_by_one_that_lends_as_much(lends: int, fits: bool) -> None:
    ledger = Ledger(BLOCK)
    for name in ("lost", "home"):
        ledger.add_worker(Endpoint(name, "host", 1), 4)
    ledger.reserve(1, (Span("lost", 0, 3 * BLOCK), Span("home", 3 * BLOCK, 7 * BLOCK)))
    ledger.commit(1, 5 * BLOCK)
    ledger.add_worker(Endpoint("other", "host", 1), 8, lend_limit=lends)
    ledger.remove_worker("lost")
    request = Request(1, array("i", range(20)), Asked(0.0, SamplingParams(max_new_tokens=9)))
    placement = placement_without_losses(ledger, policy_named("overflow", PRESET), request)
    assert placement == ((Span("other", 0, 3 * BLOCK), Span("home", 3 * BLOCK, 7 * BLOCK)) if fits else None)


@pytest.mark.parametrize(("need", "found"), [(7, True), (8, False)])
def test_lent_blocks_go_home_where_the_creditor_then_has_room_for_who_waits(need: int, found: bool) -> None:
    ledger = Ledger(BLOCK)
    ledger.add_worker(Endpoint("creditor", "host", 1), 7)
    ledger.add_worker(Endpoint("debtor", "host", 1), 6)
    ledger.reserve(1, (Span("creditor", 0, 5 * BLOCK), Span("debtor", 5 * BLOCK, 6 * BLOCK)))
    ledger.commit(1, 5 * BLOCK + 1)
    moves = recalls(ledger, [Ask(2, 1, need * BLOCK)])
    assert moves == ([Move(1, 0, 5 * BLOCK, "creditor", "debtor")] if found else [])
    assert not recalls(ledger, [])
    assert not recalls(ledger, [Ask(2, 1, 5 * BLOCK)]), "it fits on the debtor"
    ledger.retire_worker("debtor")
    assert not recalls(ledger, [Ask(2, 1, need * BLOCK)])


def test_no_more_blocks_go_home_than_there_is_room_and_than_are_needed() -> None:
    ledger = Ledger(BLOCK)
    ledger.add_worker(Endpoint("creditor", "host", 1), 9)
    for name in ("one", "two"):
        ledger.add_worker(Endpoint(name, "host", 1), 4)
    for number, name in enumerate(("one", "two", "one")):
        ledger.reserve(number, (Span("creditor", 0, 3 * BLOCK), Span(name, 3 * BLOCK, 4 * BLOCK)))
        ledger.commit(number, 3 * BLOCK + 1)
    moves = recalls(ledger, [Ask(9, 1, 5 * BLOCK)])
    assert sum(move.tokens for move in moves) == 5 * BLOCK
    assert all(
        sum(move.tokens for move in moves if move.target == name) <= ledger.workers[name].free * BLOCK
        for name in ("one", "two")
    )
    for move in moves:
        ledger.start_move(move)
    for move in moves:
        ledger.finish_move(move)
    assert ledger.workers["creditor"].free >= 5
