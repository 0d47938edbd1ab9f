"""A worker dies and there is room elsewhere: only its part is recomputed."""

from __future__ import annotations

import pytest
from _simulated import Simulated, cluster_of, expected, finish
from test_document_life import ask, prompt, stored, used

from distkv_dask.sampling import SamplingParams


def computed(cluster: Simulated, number: int) -> int:
    """Tokens of a sequence that are waiting to be computed."""
    return sum(len(chunk.tokens) for chain in cluster.chunks for chunk in chain if chunk.sequence == number)


def lies_on(cluster: Simulated, number: int) -> dict[str, int]:
    """Tokens of a sequence by worker."""
    spans = cluster.life.ledger.sequences[number].placement
    return {worker: sum(s.tokens for s in spans if s.worker == worker) for worker in {s.worker for s in spans}}


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_document_computes_only_what_the_lost_worker_held(part: int) -> None:
    cluster = stored([4, 4, 4], tokens=40)
    cluster.add_worker(4)
    spans = cluster.life.ledger.sequences[0].placement
    victim = spans[part].worker
    lost = lies_on(cluster, 0)[victim]
    cluster.lose_worker(victim)
    assert computed(cluster, 0) == lost < 40
    ask(cluster, 1, tokens=40)
    finish(cluster)
    assert cluster.tokens[1] == expected(1, 5)
    assert cluster.reused[1] == 40


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_decoding_request_computes_only_what_the_lost_worker_held(part: int) -> None:
    cluster = cluster_of(0, 4, 4, 4)
    sampling = SamplingParams(max_new_tokens=8)
    cluster.submit(1, prompt(1, 40), sampling)
    while not cluster.tokens[1]:
        cluster.step()
    cluster.add_worker(4)
    spans = cluster.life.ledger.sequences[1].placement
    assert len(spans) == 3
    cluster.lose_worker(spans[part].worker)
    seen = 0
    while cluster.step():
        seen = max(seen, computed(cluster, 1))
    assert 0 < seen <= 16
    assert cluster.tokens[1] == expected(1, 8)
    assert used(cluster) == 0


def test_a_prompt_that_loses_a_worker_goes_on_from_what_it_has() -> None:
    cluster = cluster_of(0, 4, 4, 4)
    cluster.submit(1, prompt(1, 44), SamplingParams(max_new_tokens=4))
    while computed(cluster, 1) > 8:
        cluster.step()
    cluster.add_worker(4)
    first = cluster.life.ledger.sequences[1].placement[0].worker
    cluster.lose_worker(first)
    while cluster.life.requests[1].state.label == "retiring":
        cluster.step()
    assert computed(cluster, 1) <= 16 + 8
    finish(cluster)
    assert cluster.tokens[1] == expected(1, 4)


def test_room_that_was_not_used_yet_is_replaced_without_computing() -> None:
    cluster = cluster_of(3, 10, 10)
    cluster.submit(1, prompt(1, 8), SamplingParams(max_new_tokens=60))
    while not cluster.tokens[1]:
        cluster.step()
    account = cluster.life.ledger.sequences[1]
    assert len(account.placement) == 2
    assert account.length < account.placement[0].stop
    cluster.add_worker(10)
    cluster.lose_worker(account.home)
    while cluster.life.requests[1].state.label == "retiring":
        cluster.step()
    assert not computed(cluster, 1)
    finish(cluster)
    assert cluster.tokens[1] == expected(1, 60)


def test_while_it_is_mended_a_document_shares_nothing_and_is_asked_for_after_that() -> None:
    cluster = stored([4, 4, 4], tokens=40)
    cluster.add_worker(4)
    cluster.lose_worker(cluster.life.ledger.sequences[0].placement[0].worker)
    ask(cluster, 1, tokens=40)
    cluster.submit(2, prompt(0, 20, 5), SamplingParams(max_new_tokens=3))
    finish(cluster)
    assert cluster.tokens[1] == expected(1, 5)
    assert cluster.tokens[2] == expected(2, 3)
    assert cluster.reused == {0: 0, 1: 40, 2: 0}
