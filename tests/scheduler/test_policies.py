"""One contract for all policies: placements and moves always fit, and requests up to their limit are placed."""

from __future__ import annotations

import ast
import inspect
from dataclasses import replace
from pathlib import Path

import pytest
from _examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from distkv_dask.placement import Endpoint, Span
from distkv_dask.scheduler.costs.model import fit_decode
from distkv_dask.scheduler.costs.presets import LINKS, PRESETS
from distkv_dask.scheduler.ledger.invariants import check_ledger
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.lifecycle.admission import reserve
from distkv_dask.scheduler.policies import POLICIES, policy_named
from distkv_dask.scheduler.policies.base import Ask, Policy
from distkv_dask.scheduler.policies.dgfm import find_cycle
from distkv_dask.scheduler.policies.queue import Queue

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
@settings(max_examples=examples(60), deadline=None)
@given(workers, asks, st.integers(0, 12), st.data())
def test_what_is_placed_and_moved_always_fits_and_every_request_gets_its_turn(
    name: str, sizes: list[int], lengths: list[int], lend_limit: int, data: st.DataObject
) -> None:
    policy, ledger = policy_named(name, MODEL), ledger_of(*sizes, lend_limit=lend_limit)
    queue = Queue(ledger, policy)
    limit = policy.limit(ledger)
    wanted = [n for n, length in enumerate(lengths) if ledger.blocks(length) <= limit]
    for number in wanted:
        queue.enqueue(Ask(number, lengths[number], lengths[number], float(number)))
    served: list[int] = []
    for _ in range(4 * len(lengths) + 4):
        while (chosen := queue.choose()) is not None:
            reserve(ledger, *chosen)
            ask, placement = chosen
            served.append(ask.sequence)
            assert placement[-1].stop == ask.tokens
            assert len({span.worker for span in placement}) == len(placement)
            assert all(span.stop % BLOCK == 0 for span in placement[:-1])
            assert all(account.lent <= account.lend_limit for account in ledger.workers.values())
            ledger.commit(ask.sequence, ask.tokens)
            check_ledger(ledger)
        moves = policy.moves(ledger, list(queue))
        for move in moves:
            ledger.start_move(move)
        for move in moves:
            ledger.finish_move(move)
        check_ledger(ledger)
        if ledger.sequences:
            ledger.release_sequence(data.draw(st.sampled_from(sorted(ledger.sequences))))
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
    ledger = ledger_of(9, 9)
    late_and_urgent, early = Ask(1, 100, 100, 30.0, priority=1), Ask(0, 100, 100, 0.0)
    assert policy.rank(ledger, late_and_urgent) < policy.rank(ledger, early)
    assert policy.rank(ledger, Ask(2, 100, 100, 3600.0, priority=1)) > policy.rank(ledger, early)


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
    assert not ledger.owes.by_pair()


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


def test_best_lays_a_request_on_as_few_hosts_as_possible_and_rather_waits_where_links_are_slow() -> None:
    ledger = ledger_of(8, 8, 8, 8, 8, 8)  # three hosts
    slow, fast = (policy_named("best", replace(MODEL, between=LINKS[link])) for link in ("1gbe", "nvlink"))
    for number, worker in enumerate(("w0", "w2", "w4")):
        ledger.reserve(number, (Span(worker, 0, 6 * BLOCK),), 6 * BLOCK)
    large = Ask(3, 25 * BLOCK, 25 * BLOCK)  # larger than any host, smaller than the room that there is now
    assert slow.place(ledger, large) is None
    spread = fast.place(ledger, large)
    assert spread is not None
    assert len({ledger.workers[span.worker].endpoint.host for span in spread}) == 3
    ledger.release_sequence(0)
    placement = slow.place(ledger, large)
    assert placement is not None
    assert len({ledger.workers[span.worker].endpoint.host for span in placement}) == 2


def test_best_does_not_wait_for_room_that_documents_keep() -> None:
    ledger, best = ledger_of(8, 8, 8, 8), policy_named("best", MODEL)
    for number, worker in enumerate(("w0", "w2")):
        ledger.reserve(number, (Span(worker, 0, 4 * BLOCK),), 4 * BLOCK, idle=True)
        ledger.commit(number, 4 * BLOCK)
    assert best.place(ledger, Ask(2, 14 * BLOCK, 14 * BLOCK)) is not None, "on both hosts, since none can be emptied"
    ledger.release_sequence(0)
    placement = best.place(ledger, Ask(2, 14 * BLOCK, 14 * BLOCK))
    assert {span.worker for span in placement or ()} == {"w0", "w1"}


def test_best_starts_what_takes_longest_first_with_its_answer_counted() -> None:
    ledger, best = ledger_of(8, 8), policy_named("best", MODEL)
    prompt = [best.rank(ledger, Ask(0, tokens, tokens + 8)) for tokens in (8, 80, 800)]
    answer = [best.rank(ledger, Ask(0, 8, 8 + tokens)) for tokens in (8, 80, 800)]
    urgent = [best.rank(ledger, Ask(0, 8, 8 + tokens, priority=1)) for tokens in (8, 80, 800)]
    assert prompt == sorted(prompt, reverse=True)
    assert answer == sorted(answer, reverse=True)
    assert urgent == sorted(urgent)
    assert answer[2] < prompt[2], "a token that is decoded takes longer than one of a prompt"


def test_best_gives_a_request_to_the_worker_that_would_be_done_first() -> None:
    ledger, best = ledger_of(30, 31, 32), policy_named("best", MODEL)
    ledger.reserve(0, (Span("w2", 0, 12 * BLOCK),), BLOCK)  # eleven blocks of answer are to come
    ledger.reserve(1, (Span("w1", 0, 12 * BLOCK),), 11 * BLOCK)
    ledger.reserve(2, (Span("w0", 0, 12 * BLOCK),), 11 * BLOCK)
    for number, tokens in ((0, BLOCK), (1, 11 * BLOCK), (2, 0)):
        ledger.commit(number, tokens)  # the last one's prompt is still to be computed
    ask = Ask(3, BLOCK, 2 * BLOCK)
    assert best.place(ledger, ask) == (Span("w1", 0, 2 * BLOCK),)
    ledger.retire_worker("w1")
    assert best.place(ledger, ask) == (Span("w0", 0, 2 * BLOCK),), "a short prompt is over sooner than a long answer"


def test_the_performance_model_recovers_the_machine_that_was_measured() -> None:
    step, row, token = 0.05, 0.0017, 2.1e-6
    samples = [(b, t, step + b * row + t * token) for b in (1, 8, 32) for t in (100, 10_000, 100_000)]
    assert fit_decode(samples) == pytest.approx((step, row, token), rel=1e-6)
    with pytest.raises(ValueError, match="at least two batch sizes"):
        fit_decode([(1, 100, 0.1), (1, 200, 0.2), (1, 300, 0.3)])


CHANGES = {
    "add_worker", "remove_worker", "retire_worker", "reserve", "commit", "make_document", "split", "replace_lost",
    "lay", "resize", "release_sequence", "start_move", "finish_move", "cancel_move",
}  # fmt: skip
"""Methods that change a ledger."""


def test_policies_and_the_queue_only_read_the_ledger() -> None:
    reading = {"blocks", "own_blocks", "holders", "is_shareable", "objection"}
    public = {name for name, one in inspect.getmembers(Ledger, inspect.isfunction) if not name.startswith("_")}
    assert public == reading | CHANGES
    for module in Path(inspect.getfile(Queue)).parent.glob("*.py"):
        used = {node.attr for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.Attribute)}
        assert not used & CHANGES, module.name
