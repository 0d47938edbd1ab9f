"""Default moves: lent blocks return when their creditor needs the room, and idle workers get a share."""

from __future__ import annotations

import itertools
from array import array
from dataclasses import replace

import pytest

from distkv_dask.config import Config
from distkv_dask.messages import to_worker as to
from distkv_dask.messages.client_calls import Generate
from distkv_dask.messages.from_worker import Retired
from distkv_dask.placement import Endpoint, Move, Span
from distkv_dask.sampling import SamplingParams
from distkv_dask.scheduler.costs.model import Curve, Link, PerformanceModel
from distkv_dask.scheduler.costs.presets import PRESETS
from distkv_dask.scheduler.ledger.invariants import check_ledger
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.lifecycle.events import Stop, Submit, WorkerReady
from distkv_dask.scheduler.lifecycle.machine import Lifecycle
from distkv_dask.scheduler.policies import policy_named
from distkv_dask.scheduler.policies.balance import recalls, share_with_idle
from distkv_dask.scheduler.policies.base import Ask
from distkv_dask.scheduler.records.machine_state import MachineState

BLOCK = 512
CURVE = Curve(step=0.01, row=0.001, token=3e-6, prompt=0.001, pair=0.0)
NEAR = PerformanceModel(PRESETS["a100-7b"].model.shape, CURVE, Link(1e-6, 1e9), Link(1.0, 1e9))
"""Attention is slow, links inside a host cost almost nothing, those between hosts two seconds per layer."""


def ledger_of(*capacities: int, hosts: str = "") -> Ledger:
    ledger = Ledger(BLOCK)
    for number, capacity in enumerate(capacities):
        host = hosts[number] if hosts else "host"
        ledger.add_worker(Endpoint(f"w{number}", host, number), capacity)
    return ledger


def apply(ledger: Ledger, moves: list[Move]) -> None:
    for move in moves:
        assert not ledger.objection(move)
        ledger.start_move(move)
        ledger.finish_move(move)
    check_ledger(ledger)


def lent() -> Ledger:
    """w0 lends 8 of its 10 blocks to a sequence whose home w1 now has room again."""
    ledger = ledger_of(10, 14)
    ledger.reserve(0, (Span("w0", 0, 8 * BLOCK), Span("w1", 8 * BLOCK, 12 * BLOCK)))
    ledger.commit(0, 9 * BLOCK)
    return ledger


def test_a_creditor_gets_as_many_blocks_back_as_a_waiting_request_needs_and_no_more() -> None:
    ledger = lent()
    ledger.reserve(1, (Span("w1", 0, 5 * BLOCK),))
    assert ledger.workers["w1"].free == 5
    assert recalls(ledger, [Ask(2, 1, 6 * BLOCK)]) == [Move(0, 0, 4 * BLOCK, "w0", "w1")]
    apply(ledger, recalls(ledger, [Ask(2, 1, 6 * BLOCK)]))
    assert ledger.workers["w0"].free == 6
    assert recalls(ledger, [Ask(2, 1, 6 * BLOCK)]) == []


@pytest.mark.parametrize("tokens", [2 * BLOCK, 10 * BLOCK, 11 * BLOCK], ids=["fits", "fits elsewhere", "never fits"])
def test_nothing_is_recalled_for_a_request_that_has_room_or_that_no_recall_would_make_room_for(tokens: int) -> None:
    ledger = lent()
    assert recalls(ledger, []) == []
    if tokens > 10 * BLOCK:
        ledger.reserve(1, (Span("w1", 0, 9 * BLOCK),))  # the debtor has one block for the eight
    assert recalls(ledger, [Ask(2, 1, tokens)]) == []


def test_a_worker_that_joins_takes_half_of_the_longest_sequences_part_once() -> None:
    ledger = ledger_of(100, 100)
    ledger.reserve(0, (Span("w0", 0, 40 * BLOCK),))
    ledger.reserve(1, (Span("w1", 0, 10 * BLOCK),))
    for sequence, blocks in ((0, 21), (1, 9)):
        ledger.commit(sequence, blocks * BLOCK)
    assert share_with_idle(ledger, NEAR) == []
    ledger.add_worker(Endpoint("w2", "host", 2), 100)
    moves = share_with_idle(ledger, NEAR)
    assert moves == [Move(0, 0, 10 * BLOCK, "w0", "w2")]
    apply(ledger, moves)
    for _ in range(5):
        assert share_with_idle(ledger, NEAR) == [], "it comes to rest"


def test_a_share_goes_to_an_idle_worker_of_the_same_host_and_is_worth_what_is_still_to_be_generated() -> None:
    ledger = ledger_of(100, 60, 100, hosts="aab")
    ledger.reserve(0, (Span("w0", 0, 41 * BLOCK),))
    ledger.commit(0, 40 * BLOCK)
    assert share_with_idle(ledger, NEAR) == [Move(0, 0, 8 * BLOCK, "w0", "w1")], "eight tokens for each of 512"


@pytest.mark.parametrize("why", ["far", "slow", "short", "ending", "prompt"])
def test_an_idle_worker_gets_nothing_where_that_would_not_be_faster(why: str) -> None:
    ledger = ledger_of(100, 100, hosts="ab" if why == "far" else "aa")
    blocks = 2 if why == "short" else 40
    prompt = (blocks - 1) * BLOCK
    ledger.reserve(0, (Span("w0", 0, blocks * BLOCK),), prompt)
    ledger.commit(0, blocks * BLOCK - 1 if why == "ending" else prompt - (why == "prompt"))
    curves = {"w1": replace(CURVE, token=10 * CURVE.token)} if why == "slow" else {}
    assert share_with_idle(ledger, replace(NEAR, curves=curves)) == []


@pytest.mark.parametrize("name", ["overflow", "best"])
def test_policies_that_borrow_recall_and_share(name: str) -> None:
    policy = policy_named(name, NEAR)
    ledger = lent()
    ledger.reserve(1, (Span("w1", 0, 5 * BLOCK),))
    ledger.commit(1, 4 * BLOCK)
    assert policy.moves(ledger, [Ask(2, 1, 6 * BLOCK)])
    ledger.add_worker(Endpoint("w2", "host", 2), 100)
    assert policy.moves(ledger, [])


def test_a_request_with_a_higher_priority_gets_room_before_those_that_came_earlier() -> None:
    machine = Lifecycle(MachineState("engine", Config.load(block_tokens=16, policy="overflow"), itertools.count(1)))
    machine.handle(WorkerReady(Endpoint("w0", "host", 0), 4), 0.0)
    started: list[int] = []
    for number, priority in enumerate((0, 0, 0, 2)):
        sampling = SamplingParams(max_new_tokens=10, priority=priority)
        submission = Generate(number, array("i", range(50)), sampling)
        commands = machine.handle(Submit((submission,)), float(number))
        started += [one.sequence for one in commands if isinstance(one, to.Reserve)]
    while len(started) < 4:
        commands = machine.handle(Stop(started[-1], "cancelled"), 9.0)
        for command in commands:
            if isinstance(command, to.Retire):
                commands += machine.handle(Retired(command.worker, command.sequence), 9.0)
        started += [one.sequence for one in commands if isinstance(one, to.Reserve)]
    assert started == [0, 3, 1, 2]
