"""KV of one adapter is never used with another: not from the cache, lower tiers, documents, or by collision."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from typing import Any

import pytest
from _simulated import BLOCK, Simulated, assert_nothing_left, cluster_of, expected, finish

from distkv_dask.adapter import Adapter
from distkv_dask.errors import InvalidRequestError
from distkv_dask.messages import to_worker as to
from distkv_dask.messages.names import Saved
from distkv_dask.sampling import SamplingParams
from distkv_dask.scheduler import commands as do
from distkv_dask.scheduler.cache import beginnings, common, copies, prefix_cache, restore
from distkv_dask.scheduler.records import prefix_index

ONE, TWO = Adapter("/one", "1" * 64), Adapter("/two", "2" * 64)
FIVE = SamplingParams(max_new_tokens=5)


def text(seed: int, tokens: int) -> array[int]:
    return array("i", (random.Random(seed).randrange(10**6) for _ in range(tokens)))


def ask(cluster: Simulated, number: int, prompt: array[int], adapter: Adapter | None, **how: Any) -> int:
    """Answer a request; returns how many tokens it reused."""
    cluster.submit(number, prompt, FIVE, adapter=adapter, **how)
    finish(cluster)
    assert cluster.tokens[number] == expected(number, 5)
    return cluster.reused[number]


def adapters_of(commands: list[do.Command], sequence: int) -> Iterator[Adapter | None]:
    """The adapters with which a sequence was computed and decoded."""
    for command in commands:
        match command:
            case do.SubmitPrefill(chunks):
                yield from (chunk.adapter for chunk in chunks if chunk.sequence == sequence)
            case to.Join(_, state) if state.sequence == sequence:
                yield state.adapter


@pytest.fixture(params=["hashes that differ", "hashes that all collide"])
def hashes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Also use keys that do not depend on adapters, so that matches must be compared."""
    if "collide" in request.param:
        plain = prefix_index.chain

        def colliding(tokens: array[int], block_tokens: int, adapter: str) -> Iterator[int]:
            return plain(tokens, block_tokens, "")

        for module in (prefix_index, beginnings, prefix_cache, restore, common):
            monkeypatch.setattr(module, "chain", colliding)
    found: str = request.param
    return found


def test_only_requests_of_the_same_adapter_share_what_is_cached(hashes: str) -> None:
    cluster, prompt = cluster_of(0, 100), text(1, 36)
    assert ask(cluster, 1, prompt, ONE) == 0
    for number, adapter in enumerate((TWO, None), 2):
        assert ask(cluster, number, prompt, adapter) == 0
    if "differ" in hashes:
        assert [ask(cluster, 4 + at, prompt, one) for at, one in enumerate((None, ONE, TWO))] == [32] * 3
    assert_nothing_left(cluster)


def test_requests_that_run_together_share_beginnings_with_the_same_adapter_only(hashes: str) -> None:
    for adapters in ((ONE, TWO), (ONE, None), (None, ONE), (ONE, ONE)):
        cluster, prompt = cluster_of(0, 100), text(1, 60)
        for number, adapter in enumerate(adapters, 1):
            cluster.submit(number, prompt, FIVE, adapter=adapter)
        finish(cluster)
        assert cluster.tokens == {number: expected(number, 5) for number in (1, 2)}
        if adapters[0] != adapters[1]:
            assert cluster.reused[2] == 0
        elif "differ" in hashes:
            assert cluster.reused[2] > 0
        assert_nothing_left(cluster)


def test_copies_in_lower_tiers_come_back_to_their_adapter_only(hashes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "EXTENT_TOKENS", 2 * BLOCK)
    cluster = cluster_of(0, 10, prefix_cache_tier="disk", spill=10_000)
    assert ask(cluster, 1, text(1, 36), ONE) == 0
    assert ask(cluster, 2, text(2, 36), ONE) == 0  # takes all blocks
    assert ask(cluster, 3, text(1, 36), TWO) == 0
    assert ask(cluster, 4, text(2, 36), None) == 0
    if "differ" in hashes:
        assert ask(cluster, 5, text(1, 36), ONE) == 32
    assert_nothing_left(cluster)


def test_a_document_is_asked_and_borrowed_with_its_adapter_only(hashes: str) -> None:
    cluster, prompt = cluster_of(0, 100), text(1, 36)
    cluster.ingest(1, prompt[:32], adapter=ONE)
    finish(cluster)
    for number, wrong in enumerate((TWO, None), 2):
        with pytest.raises(InvalidRequestError, match="another adapter"):
            cluster.submit(number, prompt, FIVE, document=1, adapter=wrong)
    assert ask(cluster, 4, prompt, ONE, document=1) == 32
    assert ask(cluster, 5, prompt, TWO) == 0
    if "differ" in hashes:
        assert ask(cluster, 6, prompt, ONE) == 32, "the document is borrowed"
    cluster.save(7, 1, Saved("folder"))
    finish(cluster)
    assert cluster.ends[7] == ("stop", None)
    cluster.stop(1)
    finish(cluster)
    assert_nothing_left(cluster)


def test_what_was_lost_with_a_worker_is_recomputed_and_decoded_with_the_adapter() -> None:
    cluster = cluster_of(0, 30, 30)
    commands = cluster.watch()
    cluster.submit(1, text(1, 36), SamplingParams(max_new_tokens=40), adapter=ONE)
    for _ in range(5000):
        if cluster.life.requests[1].state.label == "decode" and len(cluster.tokens[1]) > 2:
            break
        assert cluster.step()
    before = len(list(adapters_of(commands, 1)))
    cluster.lose_worker(cluster.life.ledger.sequences[1].home)
    finish(cluster)
    found = list(adapters_of(commands, 1))
    assert len(found) > before
    assert {*found} == {ONE}
    assert_nothing_left(cluster)
