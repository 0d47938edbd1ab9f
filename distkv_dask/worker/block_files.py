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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from distkv_dask.errors import DistKVError, SavedDocumentError, portable
from distkv_dask.protocol import OWN_DISK, FromWorker, Saved, SavedFile
from distkv_dask.worker.pool import Pool
from distkv_dask.worker.storage import blocks_within, overlapping, read_blocks, read_rows, uncovered, write_blocks

FREE_PART = 0.5
"""Part of the free disk that is filled at most."""

PIECE_BYTES = 16 << 20
"""Bytes of blocks that are asked of another worker at once, at most (or one block)."""

Peer = Callable[[SavedFile, int, int], Awaitable[Any]]
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
    limit
        Bytes of files there, at most; less where less is free on that disk.
    silence
        Seconds that another worker may take for an answer.
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
        limit: int,
        silence: float,
        tell: Callable[[FromWorker, Any], None],
    ) -> None:
        self.capacity = min(limit, int(shutil.disk_usage(folder.parent).free * FREE_PART))
        self._pool = pool
        self._worker = worker
        self._folder = folder
        self._silence = silence
        self._tell = tell
        self._disk = ThreadPoolExecutor(1, "distkv-disk")

    async def store(self, number: int, sequence: int, ranges: Sequence[tuple[int, int]], saved: Saved) -> None:
        """Write the blocks of token ranges of a sequence, which nobody changes, and tell the end of ``number``."""
        files: tuple[SavedFile, ...] = ()
        error: DistKVError | None = None
        try:
            disk = self._disk if saved.place == OWN_DISK else None
            files = await self._run(disk, self._write, sequence, ranges, saved)
        except Exception as failure:
            error = portable(failure, f"worker {self._worker} in saving sequence {sequence}")
        self._tell(FromWorker.STORED, (number, files, error))

    async def fetch(self, peer: Peer, sequence: int, ranges: Sequence[tuple[int, int]], saved: Saved) -> None:
        """Fill the blocks of token ranges of a sequence from where they are saved; tell the end."""
        error: DistKVError | None = None
        try:
            for start, stop in ranges:
                if (gap := uncovered(start, stop, saved.files)) < stop:
                    raise SavedDocumentError(f"tokens {gap} to {stop} of sequence {sequence} are in none of its files")
                for file in overlapping(start, stop, saved.files):
                    if file.worker in ("", self._worker):
                        await self._run(None, self._read, sequence, start, stop, saved, file)
                    else:
                        await self._ask(peer, sequence, start, stop, file)
        except Exception as failure:
            error = portable(failure, f"worker {self._worker} in loading sequence {sequence}")
        self._tell(FromWorker.FETCHED, (sequence, error))

    async def rows(self, file: SavedFile, first: int, count: int) -> np.ndarray:
        """Blocks of a file on the own disk, uint8 [count, bytes of a block], for another worker.

        Raises
        ------
        SavedDocumentError
            It is not there or damaged.
        """
        rows: np.ndarray = await self._run(None, self._rows, file, first, count)
        return rows

    def discard(self, names: Iterable[str]) -> None:
        """Delete files of the own disk, after all that it was asked for before."""
        self._disk.submit(self._delete, tuple(names))

    def close(self) -> None:
        """Wait for what is under way, and delete the own disk's files. Can be called again."""
        self._disk.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _run(self, disk: ThreadPoolExecutor | None, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(disk, partial(work, *arguments))

    def _write(self, sequence: int, ranges: Sequence[tuple[int, int]], saved: Saved) -> tuple[SavedFile, ...]:
        own, files = saved.place == OWN_DISK, []
        if own:
            self._folder.mkdir(exist_ok=True)
        for start, stop in ranges:
            name = f"blocks-{saved.tag}-{start}-{stop}.arrow"
            file = write_blocks(self._pool, sequence, start, stop, self._place(saved), name)
            files.append(file._replace(worker=self._worker if own else ""))
        return tuple(files)

    def _read(self, sequence: int, start: int, stop: int, saved: Saved, file: SavedFile) -> None:
        read_blocks(self._pool, sequence, start, stop, self._place(saved), file)

    async def _ask(self, peer: Peer, sequence: int, start: int, stop: int, file: SavedFile) -> None:
        """Fill blocks from a file on another worker's disk."""
        into, first = blocks_within(self._pool, sequence, start, stop, file)
        step = max(1, PIECE_BYTES // self._pool.bytes.shape[1])
        for at in range(0, len(into), step):
            some = into[at : at + step]
            rows = await asyncio.wait_for(peer(file, first + at, len(some)), self._silence)
            if isinstance(rows, str):
                raise SavedDocumentError(rows)
            await self._run(None, self._fill, some, rows)

    def _fill(self, blocks: list[int], rows: np.ndarray) -> None:
        for block, row in zip(blocks, rows, strict=True):
            self._pool.bytes[block] = row

    def _rows(self, file: SavedFile, first: int, count: int) -> np.ndarray:
        size = self._pool.bytes.shape[1]
        rows = np.empty((count, size), np.uint8)
        for at, row in enumerate(read_rows(str(self._folder), file, size, first, count)):
            rows[at] = row
        return rows

    def _delete(self, names: Iterable[str]) -> None:
        for name in names:
            (self._folder / name).unlink(missing_ok=True)

    def _place(self, saved: Saved) -> str:
        return str(self._folder) if saved.place == OWN_DISK else saved.place
