"""Blocks read from files: only the files that are needed are opened, and missing blocks are errors."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import torch

from distkv_dask.config import Config
from distkv_dask.errors import SavedDocumentError
from distkv_dask.messages.from_worker import Fetched, Stored
from distkv_dask.messages.names import Saved, SavedFile, Transfer
from distkv_dask.worker.blocks.files import BlockFiles
from distkv_dask.worker.blocks.pool import BlockShape, Pool
from distkv_dask.worker.blocks.spilled import Spilled

BLOCK = 4


def pool_of(blocks: int) -> Pool:
    return Pool(BlockShape(1, 1, 2, "float32", BLOCK), blocks)


async def no_peer(file: SavedFile, first: int, count: int) -> Any:
    raise AssertionError("another worker was asked")


def test_a_worker_opens_only_the_files_of_what_it_is_to_hold(tmp_path: Path) -> None:
    told: list[Any] = []
    pool, config = pool_of(8), Config.load(spill=0)
    files = BlockFiles("here", Spilled(pool, tmp_path / "own", config), config, told.append)
    pool.reserve(1, 0, 16)
    pool.storage.copy_(torch.rand(pool.storage.shape))
    before = pool.storage[list(pool.table(1))].clone()

    async def run() -> None:
        await files.store(Transfer("save", 1), 1, [(0, 8), (8, 16)], Saved(str(tmp_path)))
        stored = told.pop()
        assert stored == Stored("here", Transfer("save", 1), stored.files)
        written = stored.files
        (tmp_path / written[1].name).unlink()  # not needed by the holder of the first half
        pool.storage[list(pool.table(1))] = 0
        await files.fetch(no_peer, 1, [(0, 8)], Saved(str(tmp_path), written))
        assert told.pop() == Fetched("here", 1)
        await files.fetch(no_peer, 1, [(0, 16)], Saved(str(tmp_path), written))
        missing = told.pop().error
        assert isinstance(missing, SavedDocumentError)
        await files.fetch(no_peer, 1, [(0, 16)], Saved(str(tmp_path), written[:1]))
        missing = told.pop().error
        assert "tokens 8 to 16" in str(missing)

    asyncio.run(run())
    files.close()
    assert torch.equal(pool.storage[list(pool.table(1))][:2], before[:2])
