"""Plans that do not match what a worker holds fail only the requests that they are about."""

from __future__ import annotations

from array import array

import pytest
from _simulated import Simulated, assert_nothing_left, cluster_of, expected, finish

from distkv_dask.errors import PlanError
from distkv_dask.messages.from_worker import GangFailed
from distkv_dask.sampling import SamplingParams

NEW = 20
DOCUMENT, STRANGER = 0, 99


def decoding() -> Simulated:
    """A document, two questions on it and two plain requests, all of which decode at one home."""
    cluster = cluster_of(1, 60, prefix_cache=False)
    cluster.ingest(DOCUMENT, array("i", range(16)))
    finish(cluster)
    for number in (1, 2, 3, 4):
        shared = cluster.life.requests[DOCUMENT].prompt if number < 3 else array("i")
        prompt = shared + array("i", range(1000 * number, 1000 * number + 5))
        document = DOCUMENT if number < 3 else None
        sampling = SamplingParams(max_new_tokens=NEW)
        cluster.submit(number, prompt, sampling, document=document)
    while cluster.chunks:
        cluster.run_chunk(cluster.chunks[0][0])
        cluster.chunks = [chain for chain in cluster.chunks if chain]
    cluster.run_window(cluster.windows["w0"][0])
    assert all(len(cluster.life.requests[number].generated) > 1 for number in (1, 2, 3, 4))
    return cluster


@pytest.mark.parametrize(("named", "culprits"), [(1, {1}), (3, {3}), (4, {4}), (DOCUMENT, {1, 2}), (STRANGER, set())])
def test_a_fault_in_a_plan_ends_those_alone_whose_plan_it_is(named: int, culprits: set[int]) -> None:
    cluster = decoding()
    error = PlanError("w0 has no such blocks", named)
    cluster.handle(GangFailed("w0", cluster.windows["w0"][0].gang.number, error))
    finish(cluster)
    assert {number for number, (reason, _) in cluster.ends.items() if reason == "error"} == culprits
    assert all(cluster.ends[number][1] is error for number in culprits)
    for number in {1, 2, 3, 4} - culprits:
        assert cluster.tokens[number] == expected(number, NEW)
    cluster.stop(DOCUMENT)
    finish(cluster)
    assert_nothing_left(cluster)
