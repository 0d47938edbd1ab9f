"""Blocks in files: documents that their users save, and what is spilled to this worker's own disk.

The own disk is the lower tier of the pool (a folder in the worker's local directory, which Dask deletes with the
worker, or after a crash when another one starts there). One thread works on it in the order of what it is asked, so a
file is never deleted before it is written. Another worker's disk is read through that worker.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from distkv_dask.config import Config
from distkv_dask.errors import DistKVError, SavedDocumentError, portable
from distkv_dask.filesystems import folder_at
from distkv_dask.folder import Folder
from distkv_dask.local_folder import LocalFolder
from distkv_dask.messages.from_worker import Fetched, FromWorker, Stored
from distkv_dask.messages.names import OWN_DISK, Saved, SavedFile, SpilledFile
from distkv_dask.watch import Watch, watched
from distkv_dask.worker.blocks.pool import Pool
from distkv_dask.worker.blocks.storage import (
    blocks_within,
    overlapping,
    read_blocks,
    read_rows,
    uncovered,
    write_blocks,
)

FREE_PART = 0.5
"""Part of the free disk that is filled at most."""

PIECE_BYTES = 16 << 20
"""Bytes of blocks that are asked of another worker at once, at most (or one block)."""

Peer = Callable[[SpilledFile, int, int], Awaitable[Any]]
"""Asks the worker that has a file for blocks of it: the first row, and how many."""


class BlockFiles:
    """Files of one engine on one worker.

    Parameters
    ----------
    pool
        Whose blocks are written and filled.
    worker
        This worker's address.
    folder
        Of the own disk; it is made when the first file is written.
    config
        Bytes of files there, at most (less where less is free on that disk), and limits in time: for answers of other
        workers, and for a folder that takes or gives a piece.
    tell
        Sends an event of the engine to the gManager.

    Attributes
    ----------
    capacity
        Bytes of files on the own disk, at most.
    """

    def __init__(
        self,
        pool: Pool,
        worker: str,
        folder: Path,
        config: Config,
        tell: Callable[[FromWorker], None],
    ) -> None:
        self.capacity = min(config.spill, int(shutil.disk_usage(folder.parent).free * FREE_PART))
        self._pool = pool
        self._worker = worker
        self._folder = LocalFolder(folder)
        self._silence = config.timeout_receive
        self._standstill = config.timeout_files
        self._tell = tell
        self._disk = ThreadPoolExecutor(1, "distkv-disk")

    async def store(self, number: int, sequence: int, ranges: Sequence[tuple[int, int]], saved: Saved) -> None:
        """Write the blocks of token ranges of a sequence, which nobody changes, and tell the end of ``number``."""
        files: tuple[SavedFile, ...] = ()
        error: DistKVError | None = None
        try:
            if saved.place == OWN_DISK:
                loop = asyncio.get_running_loop()
                files = await loop.run_in_executor(self._disk, self._write, Watch(), sequence, ranges, saved)
            else:
                what = f"saving in {saved.place}"
                files = await watched(self._standstill, what, self._write, sequence, ranges, saved)
        except Exception as failure:
            error = portable(failure, f"worker {self._worker} in saving sequence {sequence}")
        self._tell(Stored(self._worker, number, files, error))

    async def fetch(self, peer: Peer, sequence: int, ranges: Sequence[tuple[int, int]], saved: Saved) -> None:
        """Fill the blocks of token ranges of a sequence from where they are saved; tell the end."""
        error: DistKVError | None = None
        try:
            for start, stop in ranges:
                if (gap := uncovered(start, stop, saved.files)) < stop:
                    raise SavedDocumentError(f"tokens {gap} to {stop} of sequence {sequence} are in none of its files")
                for file in overlapping(start, stop, saved.files):
                    if isinstance(file, SpilledFile) and file.worker != self._worker:
                        await self._ask(peer, sequence, start, stop, file)
                    else:
                        what = f"reading {file.name} in {saved.place or self._folder.place}"
                        await watched(self._standstill, what, self._read, sequence, start, stop, saved, file)
        except Exception as failure:
            error = portable(failure, f"worker {self._worker} in loading sequence {sequence}")
        self._tell(Fetched(self._worker, sequence, error))

    async def rows(self, file: SpilledFile, first: int, count: int) -> np.ndarray:
        """Blocks of a file on the own disk, uint8 [count, bytes of a block], for another worker.

        Raises
        ------
        SavedDocumentError
            It is not there or damaged.
        """
        return await watched(
            self._standstill, f"reading {file.name} for another worker", self._rows, file, first, count
        )

    def discard(self, names: Iterable[str]) -> None:
        """Delete files of the own disk, after all that it was asked for before."""
        self._disk.submit(self._delete, tuple(names))

    def close(self) -> None:
        """Wait for what is under way, and delete the own disk's files. Can be called again."""
        self._disk.shutdown()
        shutil.rmtree(self._folder.path, ignore_errors=True)

    def _write(
        self, watch: Watch, sequence: int, ranges: Sequence[tuple[int, int]], saved: Saved
    ) -> tuple[SavedFile, ...]:
        """Write a file for each range; none is left if one cannot be written."""
        own, files, folder = saved.place == OWN_DISK, list[SavedFile](), self._at(saved)
        if own:
            folder.make()
        try:
            for start, stop in ranges:
                name = f"blocks-{saved.tag}-{start}-{stop}.arrow"
                files.append(write_blocks(self._pool, sequence, start, stop, folder, name, watch, durable=not own))
        except BaseException:
            for file in files:
                folder.delete(file.name)
            raise
        return tuple(files)

    def _read(
        self, watch: Watch, sequence: int, start: int, stop: int, saved: Saved, file: SavedFile | SpilledFile
    ) -> None:
        read_blocks(self._pool, sequence, start, stop, self._at(saved), file, watch)

    async def _ask(self, peer: Peer, sequence: int, start: int, stop: int, file: SpilledFile) -> None:
        """Fill blocks from a file on another worker's disk."""
        into, first = blocks_within(self._pool, sequence, start, stop, file)
        step = max(1, PIECE_BYTES // self._pool.block_bytes)
        for at in range(0, len(into), step):
            some = into[at : at + step]
            rows = await asyncio.wait_for(peer(file, first + at, len(some)), self._silence)
            if isinstance(rows, str):
                raise SavedDocumentError(rows)
            await asyncio.get_running_loop().run_in_executor(None, self._fill, some, rows)

    def _fill(self, blocks: list[int], rows: np.ndarray) -> None:
        for block, row in zip(blocks, rows, strict=True):
            self._pool.fill(block, row)

    def _rows(self, watch: Watch, file: SpilledFile, first: int, count: int) -> np.ndarray:
        size, tokens = self._pool.block_bytes, self._pool.block_tokens
        return np.stack(list(read_rows(self._folder, file, size, tokens, first, count, watch)))

    def _delete(self, names: Iterable[str]) -> None:
        for name in names:
            self._folder.delete(name)

    def _at(self, saved: Saved) -> Folder:
        return self._folder if saved.place == OWN_DISK else folder_at(saved.place)
