"""Blocks in files: saved documents, and blocks spilled on this worker or on others.

One thread writes, moves and deletes blocks spilled here, in the order of its calls, so nothing is deleted before it is
written. Blocks spilled on another worker are read through that worker.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from distkv_dask.config import Config
from distkv_dask.errors import DistKVError, SavedDocumentError, portable
from distkv_dask.filesystems import folder_at
from distkv_dask.folder import Folder
from distkv_dask.messages.from_worker import Fetched, FromWorker, Stored
from distkv_dask.messages.names import HOST_MEMORY, OWN_DISK, Saved, SavedFile, SpilledFile, Transfer
from distkv_dask.watch import Watch, watched
from distkv_dask.worker.blocks.spilled import Spilled
from distkv_dask.worker.blocks.storage import (
    BLOCKS,
    all_or_none,
    blocks_within,
    overlapping,
    read_blocks,
    uncovered,
    write_files,
)

if TYPE_CHECKING:
    from distkv_dask.worker.home.home_files import HomeFiles

logger = logging.getLogger("distributed.distkv.files")

PIECE_BYTES = 16 << 20
"""Maximum bytes of blocks requested from another worker at once (or one block)."""

Peer = Callable[[SpilledFile, int, int], Awaitable[Any]]
"""Requests blocks of a file from its worker: the first row, and the number of rows."""


class BlockFiles:
    """Files of one engine on one worker.

    Parameters
    ----------
    worker
        This worker's address.
    spilled
        Blocks spilled here, and the pool.
    config
        Time limits for answers of other workers, and for progress of a folder.
    tell
        Sends an event of the engine to the gManager.
    home
        The states that a home has in addition to blocks, if the model needs them.
    """

    def __init__(
        self,
        worker: str,
        spilled: Spilled,
        config: Config,
        tell: Callable[[FromWorker], None],
        home: HomeFiles | None = None,
    ) -> None:
        self.spilled = spilled
        self._pool = spilled.pool
        self._home = home
        self._worker = worker
        self._silence = config.timeout_receive
        self._standstill = config.timeout_files
        self._tell = tell
        self._stages = config.stage_count
        self._disk = ThreadPoolExecutor(1, "distkv-disk")

    async def store(
        self, transfer: Transfer, sequence: int, ranges: Sequence[tuple[int, int]], saved: Saved, home: int = 0
    ) -> None:
        """Write the blocks of token ranges of an idle sequence, and report the end of the transfer.

        The state of a home after ``home`` tokens is written, too, unless that is 0.
        """
        files: tuple[SavedFile, ...] = ()
        error: DistKVError | None = None
        try:
            self._check_whole()
            if saved.place in (OWN_DISK, HOST_MEMORY):
                loop = asyncio.get_running_loop()
                files = await loop.run_in_executor(self._disk, self._spill, sequence, ranges, saved, home)
            else:
                what = f"saving in {saved.place}"
                files = await watched(self._standstill, what, self._write, sequence, ranges, saved, home)
        except Exception as failure:
            error = portable(failure, f"worker {self._worker} in saving sequence {sequence}")
        self._tell(Stored(self._worker, transfer, files, error))

    async def fetch(
        self, peer: Peer, sequence: int, ranges: Sequence[tuple[int, int]], saved: Saved, home: int = 0
    ) -> None:
        """Fill the blocks of token ranges of a sequence from files, and report the end.

        The state of a home after ``home`` tokens is read, too, unless that is 0.
        """
        error: DistKVError | None = None
        try:
            self._check_whole()
            files = [file for file in saved.files if file.name.startswith(BLOCKS)]
            if home and self._home is not None:
                for file in self._home.wanted(home, saved.files):
                    await self._fetch_home(peer, sequence, saved, file, self._home)
            for start, stop in ranges:
                if (gap := uncovered(start, stop, files)) < stop:
                    raise SavedDocumentError(f"tokens {gap} to {stop} of sequence {sequence} are in none of its files")
                for file in overlapping(start, stop, files):
                    if isinstance(file, SpilledFile) and file.worker != self._worker:
                        await self._ask(peer, sequence, start, stop, file)
                    else:
                        what = f"reading {file.name} in {saved.place or self.spilled.place}"
                        await watched(self._standstill, what, self._read, sequence, start, stop, saved, file)
        except Exception as failure:
            error = portable(failure, f"worker {self._worker} in loading sequence {sequence}")
        self._tell(Fetched(self._worker, sequence, error))

    def _check_whole(self) -> None:
        if self._stages > 1:
            raise SavedDocumentError(
                f"documents cannot be saved or loaded while layers are on {self._stages} workers (distkv.stages), each "
                "of which has a part of their KV: set distkv.stages to 1, or keep the document in memory"
            )

    async def rows(self, file: SpilledFile, first: int, count: int) -> np.ndarray:
        """Blocks of a file on this worker's disk, uint8 [count, bytes of a block], for another worker.

        Raises
        ------
        SavedDocumentError
            It is missing or damaged.
        """
        rows = self.spilled.rows if file.name.startswith(BLOCKS) else self._rows_of_home
        return await watched(self._standstill, f"reading {file.name} for another worker", rows, file, first, count)

    def _rows_of_home(self, watch: Watch, file: SpilledFile, first: int, count: int) -> np.ndarray:
        assert self._home is not None
        return np.stack(list(self._home.rows(self.spilled.folder, file, first, count, watch)))

    def demote(self, files: Iterable[SpilledFile]) -> None:
        """Move blocks spilled here from host memory to disk, after all earlier calls."""
        for file in files:
            self._disk.submit(self._logged, self.spilled.demote, file)

    def discard(self, names: Iterable[str]) -> None:
        """Delete blocks spilled here, after all earlier calls."""
        for name in names:
            self._disk.submit(self._logged, self.spilled.delete, name)

    def close(self) -> None:
        """Wait for running calls, and delete all blocks spilled here. Can be repeated."""
        self._disk.shutdown()
        self.spilled.close()

    def _write(
        self, watch: Watch, sequence: int, ranges: Sequence[tuple[int, int]], saved: Saved, home: int
    ) -> tuple[SavedFile, ...]:
        folder = folder_at(saved.place)
        more: Iterable[SavedFile] = ()
        if home and self._home is not None:
            more = self._home.write(sequence, home, folder, saved.tag, watch)
        blocks = write_files(self._pool, sequence, ranges, folder, saved.tag, watch, durable=True)
        return all_or_none(chain(more, blocks), folder.delete)

    def _spill(
        self, sequence: int, ranges: Sequence[tuple[int, int]], saved: Saved, home: int
    ) -> tuple[SavedFile, ...]:
        watch, folder = Watch(), self.spilled.folder
        more: Iterable[SavedFile] = ()
        if home and self._home is not None:
            folder.make()
            more = self._home.write(sequence, home, folder, saved.tag, watch, durable=False)
        return all_or_none(chain(more, self.spilled.write(watch, sequence, ranges, saved)), self.spilled.delete)

    async def _fetch_home(
        self, peer: Peer, sequence: int, saved: Saved, file: SavedFile | SpilledFile, home: HomeFiles
    ) -> None:
        """Restore the state of a home that a file has."""
        if isinstance(file, SpilledFile) and file.worker != self._worker:
            count, size = home.shape(file)
            rows = [row async for some in self._rows_of(peer, file, 0, count, size) for row in some]
            await asyncio.get_running_loop().run_in_executor(None, home.fill, sequence, file, rows, Watch())
            return
        folder = self.spilled.folder if isinstance(file, SpilledFile) else folder_at(saved.place)
        what = f"reading {file.name} in {folder.place}"
        await watched(self._standstill, what, self._read_home, sequence, folder, file, home)

    @staticmethod
    def _read_home(watch: Watch, sequence: int, folder: Folder, file: SavedFile | SpilledFile, home: HomeFiles) -> None:
        home.fill(sequence, file, home.rows(folder, file, 0, home.shape(file)[0], watch), watch)

    def _read(
        self, watch: Watch, sequence: int, start: int, stop: int, saved: Saved, file: SavedFile | SpilledFile
    ) -> None:
        if isinstance(file, SpilledFile):
            self.spilled.read(watch, sequence, start, stop, file)
        else:
            read_blocks(self._pool, sequence, start, stop, folder_at(saved.place), file, watch)

    async def _ask(self, peer: Peer, sequence: int, start: int, stop: int, file: SpilledFile) -> None:
        """Fill blocks from a file on another worker's disk."""
        into, first = blocks_within(self._pool, sequence, start, stop, file)
        async for rows in self._rows_of(peer, file, first, len(into), self._pool.block_bytes):
            some, into = into[: len(rows)], into[len(rows) :]
            await asyncio.get_running_loop().run_in_executor(None, self._fill, some, rows)

    async def _rows_of(
        self, peer: Peer, file: SpilledFile, first: int, count: int, size: int
    ) -> AsyncIterator[np.ndarray]:
        """Rows of a file on another worker's disk, uint8 [n, size], a few at a time."""
        step = max(1, PIECE_BYTES // size)
        for at in range(0, count, step):
            some = min(step, count - at)
            rows = await asyncio.wait_for(peer(file, first + at, some), self._silence)
            if isinstance(rows, str):
                raise SavedDocumentError(rows)
            if rows.shape != (some, size) or rows.dtype != np.uint8:  # blocks would get the contents of others
                raise SavedDocumentError(
                    f"worker {file.worker} sent {rows.dtype} {rows.shape} of {file.name} in place of {some} blocks of "
                    f"{size} bytes; do all workers have the same version of distkv-dask?"
                )
            yield rows

    def _fill(self, blocks: list[int], rows: np.ndarray) -> None:
        for block, row in zip(blocks, rows, strict=True):
            self._pool.fill(block, row)

    @staticmethod
    def _logged(work: Callable[[Any], None], what: SpilledFile | str) -> None:
        """Log an error that no caller waits for; a later read of the blocks fails."""
        try:
            work(what)
        except Exception:
            logger.exception("spilled blocks could not be moved or deleted")
