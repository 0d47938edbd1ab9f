"""Blocks of a card that move to pinned host memory and to disk return unchanged, through queued copies only."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

import emulated
from distkv_dask.config import Config
from distkv_dask.errors import CapacityError, SavedDocumentError
from distkv_dask.messages.from_worker import Fetched, FromWorker, Stored
from distkv_dask.messages.names import HOST_MEMORY, OWN_DISK, Saved, SpilledFile
from distkv_dask.worker.blocks import host_tier
from distkv_dask.worker.blocks.files import BlockFiles
from distkv_dask.worker.blocks.host_tier import HostTier
from distkv_dask.worker.blocks.pool import BlockShape, Pool
from distkv_dask.worker.blocks.spilled import Spilled
from distkv_dask.worker.device_choice import choose_device

SHAPE = BlockShape(layers=2, kv_heads=1, head_dim=4, dtype="float32", block_tokens=4)
BLOCKS, ROWS = 24, 10


@pytest.fixture
def pool() -> Pool:
    made = Pool(SHAPE, BLOCKS, choose_device("cuda"))
    with torch.inference_mode():
        made.storage.copy_(torch.rand(made.storage.shape))
    torch.cuda.synchronize()
    return made


@pytest.fixture
def tier(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> HostTier:
    """Room for ten blocks, of which four are pinned together and three are copied at once."""
    monkeypatch.setattr(host_tier, "SLAB_BYTES", 4 * SHAPE.nbytes)
    monkeypatch.setattr(host_tier, "PIECE_BYTES", 3 * SHAPE.nbytes)
    return HostTier(pool, ROWS * SHAPE.nbytes + 17)


def blocks(pool: Pool, numbers: list[int]) -> np.ndarray:
    return np.concatenate([pool.read([one]) for one in numbers])


def test_blocks_come_back_to_any_others_as_they_were(pool: Pool, tier: HostTier) -> None:
    assert tier.capacity == ROWS * SHAPE.nbytes
    here, there = [3, 4, 5, 9, 2, 1, 0], [20, 21, 10, 11, 12, 13, 15]
    before = blocks(pool, here)
    tier.store("a", [7])
    tier.store("b", here)
    tier.discard("a")
    tier.store("c", [6, 8])
    tier.fill("b", 0, there, nullcontext)
    assert np.array_equal(blocks(pool, there), before)
    tier.fill("b", 2, [16, 17], nullcontext)
    assert np.array_equal(blocks(pool, [16, 17]), before[2:4])
    assert np.array_equal(np.stack(list(tier.read("b", 1, 5))), before[1:6])


def test_all_copies_are_queued_from_and_to_pinned_memory_with_a_stop_for_each_piece(pool: Pool, tier: HostTier) -> None:
    with emulated.counting() as counts:
        tier.store("a", [0, 1, 2, 3, 4, 5])
        tier.fill("a", 0, [6, 7, 8, 9, 10, 11], nullcontext)
    assert counts.of("d2h", "pageable") == counts.of("h2d", "pageable") == 0
    assert counts.bytes_of("d2h") == counts.bytes_of("h2d") == 6 * SHAPE.nbytes
    assert counts.of("sync") == 4


def test_more_than_there_is_room_for_is_refused_and_takes_none(pool: Pool, tier: HostTier) -> None:
    tier.store("a", [0, 1, 2])
    with pytest.raises(CapacityError, match="room for 7, not 8"):
        tier.store("b", list(range(8)))
    assert "b" not in tier
    tier.store("c", list(range(7)))


def test_what_was_discarded_is_an_error(tier: HostTier) -> None:
    tier.store("a", [0])
    tier.discard("a")
    with pytest.raises(SavedDocumentError, match="a is no longer in host memory"):
        tier.fill("a", 0, [1], nullcontext)
    with pytest.raises(SavedDocumentError, match="a is no longer in host memory"):
        list(tier.read("a", 0, 1))


@pytest.fixture
def told() -> list[FromWorker]:
    return []


@pytest.fixture
def files(pool: Pool, tmp_path: Path, told: list[FromWorker]) -> Iterator[BlockFiles]:
    config = Config.load()
    made = BlockFiles("here", Spilled(pool, tmp_path / "own", config, ROWS * SHAPE.nbytes), config, told.append)
    yield made
    made.close()


async def nobody(*_: object) -> str:
    return "there is nobody else"


@pytest.mark.parametrize("demoted", [False, True])
def test_what_is_spilled_to_host_memory_is_read_from_where_it_is(
    demoted: bool, pool: Pool, files: BlockFiles, told: list[FromWorker], tmp_path: Path
) -> None:
    pool.reserve(1, 0, 26)
    before = blocks(pool, pool.find(1, [(0, 26)]))
    asyncio.run(files.store(-1, 1, [(0, 8), (8, 26)], Saved(HOST_MEMORY, tag="t")))
    (stored,) = told
    assert isinstance(stored, Stored)
    assert stored.error is None
    spilled = tuple(SpilledFile(*file, "here") for file in stored.files)
    if demoted:
        files.demote(spilled)
    pool.release_sequence(1)
    pool.reserve(2, 0, 40)
    pool.reserve(1, 0, 26)

    async def read() -> np.ndarray:
        await files.fetch(nobody, 1, [(0, 26)], Saved(OWN_DISK, spilled))
        return await files.rows(spilled[1], 1, 3)

    rows = asyncio.run(read())
    fetched = told[-1]
    assert isinstance(fetched, Fetched)
    assert fetched.error is None
    assert np.array_equal(blocks(pool, pool.find(1, [(0, 26)])), before)
    assert np.array_equal(rows, before[3:6])
    wanted = sorted(one.name for one in spilled) if demoted else []
    deadline = time.monotonic() + 10.0  # the file is being written
    while (
        written := sorted(one.name for one in (tmp_path / "own").glob("*"))
    ) != wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    assert written == wanted
    files.discard(one.name for one in spilled)
    files.close()
    assert not (tmp_path / "own").exists()


def test_what_the_disk_does_not_take_is_an_error_when_it_is_read_and_its_memory_is_free(
    pool: Pool, files: BlockFiles, told: list[FromWorker], tmp_path: Path
) -> None:
    pool.reserve(1, 0, 40)
    asyncio.run(files.store(-1, 1, [(0, 40)], Saved(HOST_MEMORY, tag="t")))
    (stored,) = told
    assert isinstance(stored, Stored)
    spilled = tuple(SpilledFile(*file, "here") for file in stored.files)
    (tmp_path / "own").write_text("no folder can be made here")
    files.demote(spilled)
    asyncio.run(files.store(-2, 1, [(0, 40)], Saved(HOST_MEMORY, tag="u")))
    asyncio.run(files.fetch(nobody, 1, [(0, 40)], Saved(OWN_DISK, spilled)))
    again, fetched = told[1:]
    assert isinstance(again, Stored)
    assert isinstance(fetched, Fetched)
    assert again.error is None
    assert isinstance(fetched.error, SavedDocumentError)
