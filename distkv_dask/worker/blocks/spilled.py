"""Blocks that were spilled on this worker: in the host memory of a worker with a card, or on its own disk.

The disk is a folder in the worker's local directory, which Dask deletes with the worker, or after a crash when another
worker starts there. The gManager chooses the tier; reads find blocks in either.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from distkv_dask.config import Config
from distkv_dask.local_folder import LocalFolder
from distkv_dask.messages.names import OWN_DISK, Saved, SavedFile, SpilledFile, sequence_in_pool
from distkv_dask.watch import Watch
from distkv_dask.worker.blocks.host_tier import HostTier
from distkv_dask.worker.blocks.pool import Pool
from distkv_dask.worker.blocks.storage import (
    batch_rows,
    blocks_within,
    file_name,
    read_blocks,
    read_rows,
    write_batches,
    write_files,
)

FREE_PART = 0.5
"""Maximum part of the free disk space that is used."""


class Spilled:
    """Both tiers of one engine on one worker.

    Parameters
    ----------
    pool
        The pool of these blocks.
    folder
        The folder on disk, created with the first file.
    config
        Maximum bytes of files there (less if less is free).
    host_bytes
        Bytes of host memory.

    Attributes
    ----------
    disk_bytes, host_bytes
        Maximum bytes of each.
    folder
        The own disk.
    """

    def __init__(self, pool: Pool, folder: Path, config: Config, host_bytes: int = 0) -> None:
        self.disk_bytes = min(config.spill, int(shutil.disk_usage(folder.parent).free * FREE_PART))
        self.place = str(folder)
        self.pool = pool
        self.folder = LocalFolder(folder)
        self._host = HostTier(pool, host_bytes)
        self.host_bytes = self._host.capacity
        self._demoted: dict[str, SavedFile] = {}

    def write(
        self, watch: Watch, sequence: int, ranges: Sequence[tuple[int, int]], saved: Saved
    ) -> Iterator[SavedFile]:
        """Write token ranges of a sequence to the tier that the gManager chose, one per iteration."""
        if saved.place == OWN_DISK:
            self.folder.make()
            yield from write_files(self.pool, sequence, ranges, self.folder, saved.tag, watch)
            return
        for start, stop in ranges:
            blocks, name = self.pool.find(sequence, [(start, stop)]), file_name(saved.tag, start, stop)
            self._host.store(name, blocks)
            yield SavedFile(name, start, stop, len(blocks) * self.pool.block_bytes, 0)

    def read(self, watch: Watch, sequence: int, start: int, stop: int, file: SpilledFile) -> None:
        """Fill the blocks of tokens ``[start, stop)`` of a sequence that are in a file of this worker."""
        if (owner := sequence_in_pool(file.name)) is not None:
            into, first = blocks_within(self.pool, sequence, start, stop, file)
            for block, data in zip(into, self._pool_rows(owner, file, first, len(into)), strict=True):
                with watch.change():
                    self.pool.fill(block, data)
        elif file.name in self._host:
            into, first = blocks_within(self.pool, sequence, start, stop, file)
            self._host.fill(file.name, first, into, watch.change)
        else:
            read_blocks(self.pool, sequence, start, stop, self.folder, self._on_disk(file), watch)

    def rows(self, watch: Watch, file: SpilledFile, first: int, count: int) -> np.ndarray:
        """Blocks of a file, uint8 [count, bytes of a block], for another worker."""
        if (owner := sequence_in_pool(file.name)) is not None:
            return self._pool_rows(owner, file, first, count)
        if file.name in self._host:
            return np.stack(list(self._host.read(file.name, first, count)))
        size, tokens = self.pool.block_bytes, self.pool.block_tokens
        return np.stack(list(read_rows(self.folder, self._on_disk(file), size, tokens, first, count, watch)))

    def demote(self, file: SpilledFile) -> None:
        """Move a file from host memory to the disk; if it cannot be written it is lost, and reading it fails."""
        size = self.pool.block_bytes
        count, most = -(-(file.stop - file.start) // self.pool.block_tokens), batch_rows(size)
        batches = (
            np.stack(list(self._host.read(file.name, at, min(most, count - at)))) for at in range(0, count, most)
        )
        try:
            self.folder.make()
            written = write_batches(batches, size, self.folder, file.name, Watch(), durable=False)
            self._demoted[file.name] = SavedFile(file.name, file.start, file.stop, *written)
        finally:
            self._host.discard(file.name)

    def delete(self, name: str) -> None:
        """Delete a file."""
        if name in self._host:
            self._host.discard(name)
        else:
            self._demoted.pop(name, None)
            self.folder.delete(name)

    def close(self) -> None:
        """Delete everything. Can be called again."""
        shutil.rmtree(self.folder.path, ignore_errors=True)

    def _pool_rows(self, owner: int, file: SpilledFile, first: int, count: int) -> np.ndarray:
        """Blocks of the pool; if they are dropped during the read, the gManager knows it and uses none of them."""
        start = file.start + first * self.pool.block_tokens
        return self.pool.read(self.pool.find(owner, [(start, start + count * self.pool.block_tokens)]))

    def _on_disk(self, file: SpilledFile) -> SavedFile | SpilledFile:
        """A file as it is on the disk, where its size differs from that in memory."""
        return self._demoted.get(file.name, file)
