"""Chunks of prompts whose worker does not begin them: nobody waits for these without end."""

from __future__ import annotations

from array import array

from test_lifecycle import Simulated, assert_nothing_left, cluster_of, expected, finish

from distkv_dask.errors import CapacityError, GangAbortedError
from distkv_dask.types import SamplingParams

LIMIT = 300.0


def submit(cluster: Simulated, number: int, tokens: int = 20) -> None:
    cluster.run(cluster.life.submit(number, array("i", range(tokens)), SamplingParams(max_new_tokens=5), cluster.now))


def pass_time(cluster: Simulated, seconds: float) -> None:
    """Let time pass in which no worker begins a task of Dask's, but all answer messages."""
    for _ in range(int(seconds)):
        cluster.now += 1
        cluster.run(cluster.life.expire(cluster.now))
        while cluster.retirements:
            worker, sequence = cluster.retirements.pop()
            cluster.run(cluster.life.retired(sequence, worker, cluster.now))


def home(cluster: Simulated, number: int) -> str:
    return cluster.life.ledger.sequences[number].home


def test_a_prompt_on_a_worker_that_dask_paused_is_computed_elsewhere() -> None:
    cluster = cluster_of(1, 20, 20)
    submit(cluster, 0)
    paused = home(cluster, 0)
    cluster.run(cluster.life.pause({paused}, cluster.now))
    submit(cluster, 1)
    assert home(cluster, 1) != paused, "nothing more is placed there"
    pass_time(cluster, LIMIT - 10)
    assert home(cluster, 0) == paused
    cluster.chunks = [chain for chain in cluster.chunks if chain[0].gang.home == paused]  # the other one computes
    cluster.life.chunk_started(next(iter(cluster.life.live[1].chunks)))
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
        cluster.run(cluster.life.pause({"w0"}, cluster.now))
        submit(cluster, 0)
        pass_time(cluster, cluster.life.config.timeout_open - 10)
        assert not cluster.ends
        if resumes:
            cluster.run(cluster.life.pause(set(), cluster.now))
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
    cluster.life.chunk_started(next(iter(cluster.life.live[0].chunks)))
    submit(cluster, 1, tokens=4)
    pass_time(cluster, 4 * LIMIT)
    assert not cluster.ends
    finish(cluster)
    assert {number: reason for number, (reason, _) in cluster.ends.items()} == {0: "length", 1: "length"}
    assert_nothing_left(cluster)


def test_a_retired_worker_that_resumes_from_a_pause_still_gets_nothing() -> None:
    cluster = cluster_of(1, 20, 20)
    for call in (
        cluster.life.drain("w0", True, 0.0),
        cluster.life.pause({"w0"}, 0.0),
        cluster.life.pause(set(), 0.0),
    ):
        cluster.run(call)
    assert cluster.life.ledger.workers["w0"].retiring
    cluster.run(cluster.life.pause({"w0"}, 0.0))
    cluster.run(cluster.life.drain("w0", False, 0.0))
    assert cluster.life.ledger.workers["w0"].retiring
    cluster.run(cluster.life.pause(set(), 0.0))
    assert not cluster.life.ledger.workers["w0"].retiring
