"""One contract for all policies: what they place and move always fits, and what they promise to hold, they hold."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distkv_dask.scheduler.admission import Admission
from distkv_dask.scheduler.ledger import Ledger
from distkv_dask.scheduler.performance import fit_decode
from distkv_dask.scheduler.policies import POLICIES, policy_named
from distkv_dask.scheduler.policies.base import Ask, Policy
from distkv_dask.scheduler.policies.dgfm import find_cycle
from distkv_dask.scheduler.presets import PRESETS
from distkv_dask.types import Endpoint, Span

BLOCK = 16
MODEL = PRESETS["a100-7b"].model


@pytest.fixture(params=list(POLICIES))
def policy(request: pytest.FixtureRequest) -> Policy:
    return policy_named(request.param, MODEL)


def ledger_of(*capacities: int, per_host: int = 2, batch: int = 8, lend_limit: int = 2**40) -> Ledger:
    ledger = Ledger(BLOCK, batch)
    for number, capacity in enumerate(capacities):
        endpoint = Endpoint(f"w{number}", f"host{number // per_host}", number)
        ledger.add_worker(endpoint, capacity, lend_limit=lend_limit)
    return ledger


workers = st.lists(st.integers(1, 12), min_size=1, max_size=6)
asks = st.lists(st.integers(1, 300), min_size=1, max_size=20)


@pytest.mark.parametrize("name", list(POLICIES))
@settings(max_examples=60, deadline=None)
@given(workers, asks, st.integers(0, 12), st.data())
def test_what_is_placed_and_moved_always_fits_and_every_request_gets_its_turn(
    name: str, sizes: list[int], lengths: list[int], lend_limit: int, data: st.DataObject
) -> None:
    policy, ledger = policy_named(name, MODEL), ledger_of(*sizes, lend_limit=lend_limit)
    admission = Admission(ledger, policy)
    limit = policy.limit(ledger)
    wanted = [n for n, length in enumerate(lengths) if ledger.blocks(length) <= limit]
    for number in wanted:
        admission.wait(Ask(number, lengths[number], lengths[number], float(number)))
    served: list[int] = []
    for _ in range(4 * len(lengths) + 4):
        while (admitted := admission.admit()) is not None:
            ask, placement = admitted
            served.append(ask.sequence)
            assert placement[-1].stop == ask.tokens
            assert len({span.worker for span in placement}) == len(placement)
            assert all(span.stop % BLOCK == 0 for span in placement[:-1])
            assert all(account.lent <= account.lend_limit for account in ledger.workers.values())
            ledger.commit(ask.sequence, ask.tokens)
            ledger.check()
        moves = policy.moves(ledger, list(admission))
        for move in moves:
            ledger.start_move(move)
        for move in moves:
            ledger.finish_move(move)
        ledger.check()
        if ledger.sequences:
            ledger.release(data.draw(st.sampled_from(sorted(ledger.sequences))))
    assert sorted(served) == wanted


def test_nothing_is_placed_on_a_worker_that_is_drained_or_has_no_weights_to_decode_with(policy: Policy) -> None:
    ledger = ledger_of(9, 9)
    ledger.retire_worker("w0")
    ledger.add_worker(Endpoint("memory", "host0", 9), 50, can_decode=False)
    placement = policy.place(ledger, Ask(0, 40, 40))
    assert placement is not None
    assert placement[-1].worker == "w1"
    assert "w0" not in {span.worker for span in placement}


def test_a_request_with_priority_comes_first_but_not_for_ever(policy: Policy) -> None:
    late_and_urgent, early = Ask(1, 100, 100, 30.0, priority=1), Ask(0, 100, 100, 0.0)
    assert policy.rank(late_and_urgent) < policy.rank(early)
    assert policy.rank(Ask(2, 100, 100, 3600.0, priority=1)) > policy.rank(early)


def test_local_only_refuses_what_borrowing_serves() -> None:
    ledger = ledger_of(4, 4, 4)
    long = Ask(0, 10 * BLOCK, 10 * BLOCK)
    assert policy_named("local-only", MODEL).limit(ledger) == 4
    assert policy_named("local-only", MODEL).place(ledger, long) is None
    for name in ("overflow", "dgfm", "greedy", "best", "single"):
        assert policy_named(name, MODEL).limit(ledger) == 12
        assert policy_named(name, MODEL).place(ledger, long) is not None


def test_a_circle_of_debts_is_found_and_cancelled() -> None:
    ledger, dgfm = ledger_of(6, 6, 6), policy_named("dgfm", MODEL)
    for number, (debtor, creditor) in enumerate([("w0", "w1"), ("w1", "w2"), ("w2", "w0")]):
        ledger.reserve(number, (Span(creditor, 0, 2 * BLOCK), Span(debtor, 2 * BLOCK, 4 * BLOCK)))
    assert sorted(find_cycle(ledger)) == ["w0", "w1", "w2"]
    while moves := dgfm.moves(ledger, []):
        for move in moves:
            ledger.start_move(move)
        for move in moves:
            ledger.finish_move(move)
    assert find_cycle(ledger) == []
    assert not ledger.debts()


def test_greedy_frees_the_memory_of_a_worker_with_a_small_batch() -> None:
    ledger = ledger_of(2000, 2000)
    ledger.reserve(0, (Span("w0", 0, 1900 * BLOCK),))
    ledger.commit(0, 1900 * BLOCK)
    waiting = [Ask(n, 300 * BLOCK, 300 * BLOCK) for n in range(1, 9)]
    ledger.reserve(99, (Span("w1", 0, 10 * BLOCK),))
    (move,) = policy_named("greedy", MODEL).moves(ledger, waiting)
    assert (move.source, move.target, move.sequence) == ("w0", "w1", 0)


def test_best_keeps_a_request_on_one_host_and_lets_others_pass_without_delaying_it() -> None:
    ledger, best = ledger_of(8, 8, 8, 8), policy_named("best", MODEL)
    placement = best.place(ledger, Ask(0, 12 * BLOCK, 12 * BLOCK))
    assert placement is not None
    assert len({ledger.workers[span.worker].endpoint.host for span in placement}) == 1
    ledger.reserve(1, (Span("w0", 0, 5 * BLOCK),))
    ledger.reserve(2, (Span("w2", 0, 6 * BLOCK),))
    ahead = Ask(3, 15 * BLOCK, 15 * BLOCK)
    assert best.place(ledger, ahead) is None
    passing = best.place(ledger, Ask(4, 2 * BLOCK, 2 * BLOCK), ahead)
    assert passing is not None
    assert passing[0].worker in {"w2", "w3"}


def test_the_performance_model_recovers_the_machine_that_was_measured() -> None:
    step, row, token = 0.05, 0.0017, 2.1e-6
    samples = [(b, t, step + b * row + t * token) for b in (1, 8, 32) for t in (100, 10_000, 100_000)]
    assert fit_decode(samples) == pytest.approx((step, row, token), rel=1e-6)
    with pytest.raises(ValueError, match="at least two batch sizes"):
        fit_decode([(1, 100, 0.1), (1, 200, 0.2), (1, 300, 0.3)])
