"""Chunks of prompts that their worker does not begin: no request waits for these forever."""

from __future__ import annotations

from array import array

from _simulated import Simulated, assert_nothing_left, cluster_of, expected, finish

from distkv_dask.errors import CapacityError, GangAbortedError
from distkv_dask.messages import from_worker as did
from distkv_dask.placement import Endpoint
from distkv_dask.sampling import SamplingParams
from distkv_dask.scheduler.lifecycle.events import WorkerLost, WorkerReady
from distkv_dask.scheduler.records.states import Prefill

LIMIT = 300.0


def submit(cluster: Simulated, number: int, tokens: int = 20) -> None:
    cluster.submit(number, array("i", range(tokens)), SamplingParams(max_new_tokens=5))


def begin(cluster: Simulated, number: int) -> None:
    state = cluster.life.requests[number].state
    assert isinstance(state, Prefill)
    cluster.handle(did.ChunkStarted("", next(iter(state.chunks))))


def pass_time(cluster: Simulated, seconds: float) -> None:
    """Let time pass in which workers answer messages, but begin no Dask tasks."""
    for _ in range(int(seconds)):
        cluster.now += 1
        cluster.tick()
        while cluster.retirements:
            cluster.handle(did.Retired(*cluster.retirements.pop()))


def home(cluster: Simulated, number: int) -> str:
    return cluster.life.ledger.sequences[number].home


def test_a_prompt_on_a_worker_that_dask_paused_is_computed_elsewhere() -> None:
    cluster = cluster_of(1, 20, 20)
    submit(cluster, 0)
    paused = home(cluster, 0)
    cluster.pause(paused)
    submit(cluster, 1)
    assert home(cluster, 1) != paused, "nothing more is placed there"
    pass_time(cluster, LIMIT - 10)
    assert home(cluster, 0) == paused
    cluster.chunks = [chain for chain in cluster.chunks if chain[0].gang.home == paused]  # the other one computes
    begin(cluster, 1)
    pass_time(cluster, 20)
    assert home(cluster, 0) != paused


def test_a_prompt_that_no_worker_begins_ends_with_an_error_that_says_what_to_do() -> None:
    cluster = cluster_of(1, 20, 20)
    submit(cluster, 0)
    pass_time(cluster, 3 * LIMIT + 20)
    reason, error = cluster.ends[0]
    assert reason == "error"
    assert isinstance(error, GangAbortedError)
    assert "Dask paused it for its memory" in str(error)
    assert "distkv.kv-memory" in str(error)
    cluster.chunks.clear()
    assert_nothing_left(cluster)


def test_a_prompt_waits_for_paused_workers_as_long_as_for_missing_ones_and_is_computed_if_they_resume() -> None:
    for resumes in (False, True):
        cluster = cluster_of(1, 20)
        cluster.pause("w0")
        submit(cluster, 0)
        pass_time(cluster, cluster.life.config.timeout_open - 10)
        assert not cluster.ends
        if resumes:
            cluster.pause()
            finish(cluster)
            assert cluster.tokens[0] == expected(0, 5)
        else:
            pass_time(cluster, 20)
            error = cluster.ends[0][1]
            assert isinstance(error, CapacityError)
            assert "paused" in str(error)
        assert_nothing_left(cluster)


def test_a_worker_that_computes_something_else_for_long_is_not_taken_for_paused() -> None:
    cluster = cluster_of(1, 20)
    submit(cluster, 0)
    begin(cluster, 0)
    submit(cluster, 1, tokens=4)
    pass_time(cluster, 4 * LIMIT)
    assert not cluster.ends
    finish(cluster)
    assert {number: reason for number, (reason, _) in cluster.ends.items()} == {0: "length", 1: "length"}
    assert_nothing_left(cluster)


def test_a_retired_worker_that_resumes_from_a_pause_still_gets_nothing() -> None:
    cluster = cluster_of(1, 20, 20)
    cluster.drain("w0")
    cluster.pause("w0")
    cluster.pause()
    assert cluster.life.ledger.workers["w0"].retiring
    cluster.pause("w0")
    cluster.drain("w0", False)
    assert cluster.life.ledger.workers["w0"].retiring
    cluster.pause()
    assert not cluster.life.ledger.workers["w0"].retiring


def test_a_worker_that_comes_back_while_it_is_paused_gets_nothing_either() -> None:
    cluster = cluster_of(1, 20, 20)
    cluster.pause("w0")
    cluster.handle(WorkerLost("w0"))
    cluster.handle(WorkerReady(Endpoint("w0", "127.0.0.1", 1), 20))
    cluster.pause("w0")
    assert cluster.life.ledger.workers["w0"].retiring
