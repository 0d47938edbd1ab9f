"""The host tier compared with a dictionary: bytes return unchanged, rows are freed, and nothing is written twice."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from distkv_dask.errors import CapacityError, SavedDocumentError
from distkv_dask.worker.blocks import host_tier
from distkv_dask.worker.blocks.host_tier import HostTier
from distkv_dask.worker.blocks.pool import BlockShape, Pool

BLOCKS, ROWS = 12, 7


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs of three blocks and copies of two, so that every boundary is crossed."""
    size = BlockShape(1, 1, 4, "float32", 4).nbytes
    monkeypatch.setattr(host_tier, "SLAB_BYTES", 3 * size)
    monkeypatch.setattr(host_tier, "PIECE_BYTES", 2 * size)


def make_pool() -> Pool:
    pool = Pool(BlockShape(1, 1, 4, "float32", 4), BLOCKS)
    pool.storage.copy_(torch.arange(pool.storage.numel()).view_as(pool.storage))
    return pool


def bytes_of(pool: Pool, block: int) -> np.ndarray:
    return pool.bytes_of(block, 1)[0].numpy().copy()


class Tier(RuleBasedStateMachine):
    """Any order of storing, filling, reading and discarding."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = make_pool()
        self.tier = HostTier(self.pool, ROWS * self.pool.block_bytes + 5)
        self.kept: dict[str, list[np.ndarray]] = {}

    @rule(blocks=st.lists(st.integers(0, BLOCKS - 1), max_size=5, unique=True), name=st.sampled_from("abc"))
    def store(self, blocks: list[int], name: str) -> None:
        if name in self.kept:
            return
        if sum(map(len, self.kept.values())) + len(blocks) > ROWS:
            with pytest.raises(CapacityError, match=f"not {len(blocks)}"):
                self.tier.store(name, blocks)
            return
        self.tier.store(name, blocks)
        self.kept[name] = [bytes_of(self.pool, block) for block in blocks]

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def fill(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.kept)))
        first = data.draw(st.integers(0, len(self.kept[name])))
        count = data.draw(st.integers(0, len(self.kept[name]) - first))
        into = data.draw(st.permutations(range(BLOCKS)))[:count]
        others = {block: bytes_of(self.pool, block) for block in range(BLOCKS) if block not in into}
        entered = []

        @contextmanager
        def change() -> Iterator[None]:
            entered.append(1)
            yield

        self.tier.fill(name, first, into, change)
        assert len(entered) == -(-count // 2), "whoever waits may give up between pieces"
        for at, block in enumerate(into):
            assert (bytes_of(self.pool, block) == self.kept[name][first + at]).all()
        assert all((bytes_of(self.pool, block) == before).all() for block, before in others.items())

    @rule(name=st.sampled_from("abc"))
    def discard(self, name: str) -> None:
        self.tier.discard(name)
        self.kept.pop(name, None)

    @rule(block=st.integers(0, BLOCKS - 1), value=st.integers(0, 255))
    def overwrite(self, block: int, value: int) -> None:
        self.pool.bytes_of(block, 1).fill_(value)

    @invariant()
    def what_is_kept_is_there_and_nothing_else(self) -> None:
        for name in "abc":
            assert (name in self.tier) == (name in self.kept)
            if name in self.kept:
                assert [row.tolist() for row in self.tier.read(name, 0, len(self.kept[name]))] == [
                    row.tolist() for row in self.kept[name]
                ]
        rows = [row for rows in self.tier._rows.values() for row in rows] + self.tier._free
        assert sorted(rows) == list(range(ROWS))


TestTier = Tier.TestCase
TestTier.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


def test_what_is_gone_is_an_error_and_changes_nothing() -> None:
    pool = make_pool()
    tier, before = HostTier(pool, 2 * pool.block_bytes), pool.storage.clone()
    with pytest.raises(SavedDocumentError, match="gone is no longer in host memory"):
        tier.fill("gone", 0, [1], nullcontext)
    with pytest.raises(SavedDocumentError, match="no longer in host memory"):
        next(tier.read("gone", 0, 1))
    assert torch.equal(pool.storage, before)


def test_a_copy_that_fails_gives_its_rows_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool()
    tier = HostTier(pool, ROWS * pool.block_bytes)
    with monkeypatch.context() as broken:
        broken.setattr(pool, "bytes_of", lambda *blocks: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            tier.store("a", [0, 1, 2])
    assert "a" not in tier
    tier.store("b", range(ROWS))


def test_a_worker_without_room_has_no_tier() -> None:
    pool = make_pool()
    tier = HostTier(pool, pool.block_bytes - 1)
    assert tier.capacity == 0
    tier.store("empty", [])
    with pytest.raises(CapacityError, match="room for 0, not 1"):
        tier.store("a", [0])


def test_threads_that_store_read_and_discard_never_see_each_others_blocks() -> None:
    pool = make_pool()
    tier, wrong = HostTier(pool, ROWS * pool.block_bytes), []

    def work(number: int) -> None:
        blocks = [3 * number, 3 * number + 1]
        mine = [bytes_of(pool, block).tolist() for block in blocks]
        for turn in range(60):
            name = f"{number}-{turn}"
            tier.store(name, blocks)
            if [row.tolist() for row in tier.read(name, 0, 2)] != mine:
                wrong.append(name)
            tier.discard(name)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sorted(tier._free) == list(range(ROWS))
