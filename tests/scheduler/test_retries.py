"""Gangs that fail while their workers live are retried at once, then with pauses, and not forever."""

from __future__ import annotations

from array import array

import pytest
from _simulated import Simulated, assert_nothing_left, cluster_of, expected, finish

from distkv_dask.errors import DeviceMemoryError, GangAbortedError, PlanError
from distkv_dask.messages import from_worker as did
from distkv_dask.placement import Move
from distkv_dask.sampling import SamplingParams
from distkv_dask.scheduler import commands as do
from distkv_dask.scheduler.lifecycle.retries import MAX_RETRIES, PAUSE

SILENT = GangAbortedError("a peer was silent")


def prompt_of(tokens: int) -> Simulated:
    cluster = cluster_of(1, 8, 8)
    cluster.submit(1, array("i", range(tokens)), SamplingParams(max_new_tokens=9))
    return cluster


def prefill(cluster: Simulated) -> None:
    """Compute all prompts, and decode nothing."""
    while cluster.chunks:
        cluster.run_chunk(cluster.chunks[0][0])


def decoding() -> Simulated:
    cluster = prompt_of(44)
    prefill(cluster)
    assert cluster.life.requests[1].state.label == "decode"
    return cluster


def fail(cluster: Simulated, error: Exception = SILENT) -> bool:
    """Fail the work in progress; returns whether it is retried at once."""
    heads = [chain[0].gang for chain in cluster.chunks]
    heads += [queue[0].gang for queue in cluster.windows.values() if queue]
    commands = cluster.watch()
    cluster.handle(did.GangFailed(heads[0].home, heads[0].number, error))
    return any(isinstance(one, do.SubmitPrefill | do.SubmitWindow) for one in commands)


def rest(cluster: Simulated, seconds: float) -> bool:
    """Let time pass; returns whether the work is retried then."""
    commands = cluster.watch()
    cluster.now += seconds
    cluster.tick()
    return any(isinstance(one, do.SubmitPrefill | do.SubmitWindow) for one in commands)


@pytest.mark.parametrize("make", [lambda: prompt_of(44), decoding], ids=["prefill", "decode"])
def test_a_step_for_which_a_card_has_too_little_memory_is_tried_again_and_costs_no_token(make) -> None:
    cluster = make()
    for _ in range(MAX_RETRIES):
        assert fail(cluster, DeviceMemoryError("Emulated GPU ran out of memory in a step"))
    finish(cluster)
    assert cluster.ends[1] == ("length", None)
    assert cluster.tokens[1] == expected(1, 9)
    assert_nothing_left(cluster)


@pytest.mark.parametrize("make", [lambda: prompt_of(44), decoding], ids=["prefill", "decode"])
def test_what_fails_again_and_again_rests_before_it_is_tried_again(make) -> None:
    cluster = make()
    for _ in range(MAX_RETRIES):
        assert fail(cluster), "at once"
    assert not fail(cluster)
    assert not rest(cluster, PAUSE / 2)
    assert rest(cluster, PAUSE)
    assert not fail(cluster), "it goes on resting"
    assert rest(cluster, PAUSE + 0.1)
    finish(cluster)
    assert cluster.tokens[1] == expected(1, 9)
    assert_nothing_left(cluster)


@pytest.mark.parametrize("make", [lambda: prompt_of(44), decoding], ids=["prefill", "decode"])
def test_it_is_given_up_after_as_long_as_a_peer_may_be_silent_with_what_went_wrong_last(make) -> None:
    cluster = make()
    limit = cluster.life.config.timeout_receive
    began, last = cluster.now, GangAbortedError("the last reason")
    while 1 not in cluster.ends:
        assert cluster.now - began < limit + 3 * PAUSE
        if any(cluster.chunks) or any(cluster.windows.values()):
            fail(cluster, last)
        rest(cluster, PAUSE)
    assert cluster.now - began >= limit
    assert cluster.ends[1] == ("error", last)
    finish(cluster)
    assert_nothing_left(cluster)


def test_a_chunk_that_was_computed_makes_up_for_failures_before() -> None:
    cluster = prompt_of(54)
    for _ in range(4):
        for _ in range(MAX_RETRIES):
            assert fail(cluster)
        cluster.run_chunk(cluster.chunks[0][0])
    finish(cluster)
    assert cluster.tokens[1] == expected(1, 9)


def test_a_window_that_was_decoded_makes_up_for_failures_before() -> None:
    cluster = decoding()
    home = cluster.life.ledger.sequences[1].home
    for _ in range(3):
        for _ in range(MAX_RETRIES):
            assert fail(cluster)
        first = cluster.windows[home][0]
        parts = {1: (2, cluster.life.ledger.sequences[1].placement)}
        cluster.handle(cluster.decode(first, parts, 2, 0.1))
    finish(cluster)
    assert cluster.tokens[1] == expected(1, 9)


@pytest.mark.parametrize("error", [ValueError("a fault"), PlanError("a plan", 1)])
def test_what_would_fail_the_same_way_is_not_tried_again(error: Exception) -> None:
    cluster = prompt_of(44)
    assert not fail(cluster, error)
    assert cluster.ends[1] == ("error", error)


def together() -> Simulated:
    """Three requests that one home decodes: the first with a holder, the others without."""
    cluster = cluster_of(1, 6, 24)
    cluster.submit(1, array("i", range(40)), SamplingParams(max_new_tokens=12))
    home = cluster.life.ledger.sequences[1].home
    prefill(cluster)
    cluster.start_move(Move(1, 0, 8, home, "w0"))
    while cluster.moves:
        cluster.go_on(cluster.moves.pop())
    for number in (2, 3):
        cluster.submit(number, array("i", [number] * 5), SamplingParams(max_new_tokens=9))
    prefill(cluster)
    assert {cluster.life.ledger.sequences[number].home for number in (1, 2, 3)} == {home}
    return cluster


def test_of_sequences_that_decode_together_the_one_to_blame_ends_and_the_others_go_on() -> None:
    cluster = together()
    blamed = PlanError("a plan", 2)
    for _ in range(2 * MAX_RETRIES):
        assert fail(cluster, PlanError("a plan of nobody", 77)) or rest(cluster, PAUSE + 0.1)
    assert not cluster.ends
    (chain,) = (chain for chain in cluster.life.chains.values() if chain.sequences)
    before = chain.failures
    fail(cluster, blamed)
    assert cluster.ends == {2: ("error", blamed)}
    assert chain.failures == before, "it was nobody else's"
    finish(cluster)
    assert [cluster.tokens[number] for number in (1, 3)] == [expected(1, 12), expected(3, 9)]


def test_a_fault_that_names_nobody_ends_those_that_have_holders() -> None:
    cluster = together()
    fault = ValueError("a fault")
    fail(cluster, fault)
    assert cluster.ends == {1: ("error", fault)}
    finish(cluster)
    assert [cluster.tokens[number] for number in (2, 3)] == [expected(2, 9), expected(3, 9)]
    assert_nothing_left(cluster)
