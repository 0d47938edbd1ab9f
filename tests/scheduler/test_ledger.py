"""The ledger and its policy: properties that hold for any order of reservations, releases and lost workers."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distkv_dask.placement import Endpoint, Span
from distkv_dask.scheduler.ledger.invariants import check_ledger
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.ledger.supposed import supposed
from distkv_dask.scheduler.policies.shares import overflow

BLOCK = 16


def ledger_of(*capacities: int, batch: int = 8) -> Ledger:
    ledger = Ledger(BLOCK, batch)
    for number, capacity in enumerate(capacities):
        ledger.add_worker(Endpoint(f"w{number}", "127.0.0.1", number), capacity)
    return ledger


capacities = st.lists(st.integers(0, 12), min_size=1, max_size=5)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), st.integers(1, 400)),
        st.tuples(st.just("release"), st.integers(0, 30)),
        st.tuples(st.just("lose"), st.integers(0, 4)),
        st.tuples(st.just("join"), st.integers(0, 12)),
    ),
    max_size=60,
)


@given(capacities, steps)
def test_blocks_are_conserved_whatever_happens(sizes: list[int], events: list[tuple[str, int]]) -> None:
    ledger, live = ledger_of(*sizes), []
    for number, (event, value) in enumerate(events):
        if event == "reserve":
            placement = overflow(ledger, value)
            if placement is not None:
                ledger.reserve(number, placement)
                ledger.commit(number, value)
                live.append(number)
        elif event == "release" and live:
            ledger.release_sequence(live.pop(value % len(live)))
        elif event == "lose" and ledger.workers:
            for lost in ledger.remove_worker(sorted(ledger.workers)[value % len(ledger.workers)]):
                ledger.release_sequence(lost)
                live.remove(lost)
        elif event == "join":
            ledger.add_worker(Endpoint(f"new{number}", "127.0.0.1", number), value)
        check_ledger(ledger)
    for number in live:
        ledger.release_sequence(number)
    check_ledger(ledger)
    assert not ledger.sequences
    assert not ledger.owes.by_pair()
    assert all(account.used == account.homed == 0 for account in ledger.workers.values())


@given(capacities, st.integers(1, 1000))
def test_a_sequence_is_placed_whenever_it_fits_and_its_home_holds_the_tail(sizes: list[int], tokens: int) -> None:
    ledger = ledger_of(*sizes)
    placement = overflow(ledger, tokens)
    assert (placement is not None) == (ledger.blocks(tokens) <= sum(sizes))
    if placement is not None:
        ledger.reserve(0, placement)
        check_ledger(ledger)
        assert placement[-1].stop == tokens
        assert placement[-1].tokens > 0
        assert ledger.workers[ledger.sequences[0].home].capacity == max(sizes)
        assert len({span.worker for span in placement}) == len(placement)


def test_what_fits_at_home_is_not_spread() -> None:
    assert overflow(ledger_of(4, 9, 4), 9 * BLOCK) == (Span("w1", 0, 9 * BLOCK),)


def test_a_home_with_a_full_batch_takes_no_more_sequences() -> None:
    ledger = ledger_of(9, 4, batch=1)
    ledger.reserve(0, (Span("w0", 0, BLOCK),))
    assert overflow(ledger, BLOCK) == (Span("w1", 0, BLOCK),)
    ledger.reserve(1, (Span("w1", 0, BLOCK),))
    assert overflow(ledger, BLOCK) is None


def test_debts_are_the_blocks_that_others_hold_for_a_home() -> None:
    ledger = ledger_of(4, 4, 4)
    ledger.reserve(0, (Span("w1", 0, 40), Span("w2", 40, 56), Span("w0", 56, 100)))
    assert ledger.owes.by_pair() == {("w0", "w1"): 3, ("w0", "w2"): 1}
    assert ledger.owes.by_creditor() == {"w1": 3, "w2": 1}


def test_reserving_more_than_there_is_is_a_fault() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        ledger_of(1).reserve(0, (Span("w0", 0, BLOCK + 1),))


@pytest.mark.parametrize("spans", [(), (Span("w1", 0, 20),), (Span("w1", 0, 16), Span("w0", 16, 32))])
def test_what_is_supposed_is_forgotten_even_if_the_question_fails(spans: tuple[Span, ...]) -> None:
    ledger = ledger_of(4, 4)
    ledger.reserve(0, (Span("w0", 0, 40),))
    before = copy.deepcopy((ledger.workers, ledger.sequences, ledger.epoch))
    taken = sum(ledger.blocks(span.tokens) for span in spans)
    for error in (None, RuntimeError("no")):
        with pytest.raises(RuntimeError, match="no") if error else nullcontext(), supposed(ledger, 1, spans):
            assert sum(account.free for account in ledger.workers.values()) == 5 - taken
            check_ledger(ledger)
            if error:
                raise error
        assert (ledger.workers, ledger.sequences, ledger.epoch) == before
        check_ledger(ledger)
