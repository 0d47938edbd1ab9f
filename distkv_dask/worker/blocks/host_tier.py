"""The host tier: blocks evicted from a card, in pinned host memory, restored at the speed of the bus.

The gManager decides what is stored here, moved on to disk, or deleted. The memory is allocated when the engine opens,
because pinning more later would stall the card. A worker whose pool is in host memory has no host tier.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise

import numpy as np
from torch import Tensor, uint8

from distkv_dask.errors import CapacityError, SavedDocumentError
from distkv_dask.worker.blocks.pool import Pool
from distkv_dask.worker.device import Use

SLAB_BYTES = 1 << 30
"""Bytes that are pinned together (or one block): torch rounds each allocation up to a power of two."""

PIECE_BYTES = 64 << 20
"""Maximum bytes of one copy (or one block), so that other copies do not wait for long."""


class HostTier:
    """Blocks of a pool on a card, by the names that their files would have on disk.

    Parameters
    ----------
    pool
        The pool of these blocks.
    capacity
        Bytes of host memory; whole blocks of it are used.
    """

    def __init__(self, pool: Pool, capacity: int) -> None:
        self._pool = pool
        rows = capacity // pool.block_bytes
        self.capacity = rows * pool.block_bytes
        self._slab_rows = most = max(1, SLAB_BYTES // pool.block_bytes)
        self._slabs = [
            pool.device.host_buffer((min(most, rows - at), pool.block_bytes), uint8) for at in range(0, rows, most)
        ]
        self._free = list(reversed(range(rows)))
        self._rows: dict[str, list[int]] = {}
        self._lock = threading.Lock()

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def store(self, name: str, blocks: Sequence[int]) -> None:
        """Copy blocks of the pool here.

        Raises
        ------
        CapacityError
            There is no room for them.
        """
        with self._lock:
            if len(blocks) > len(self._free):
                raise CapacityError(f"host memory for spilled blocks has room for {len(self._free)}, not {len(blocks)}")
            rows = [self._free.pop() for _ in blocks]
        try:
            for at, some in self._pieces(rows):
                self._copy(blocks[at : at + len(some)], some, into_pool=False)
        except BaseException:
            with self._lock:
                self._free += rows
            raise
        with self._lock:
            self._rows[name] = rows

    def fill(
        self, name: str, first: int, blocks: Sequence[int], change: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """Copy the blocks of a name, from block ``first`` on, into blocks of the pool.

        ``change`` is entered for every piece, so that an abandoned call cannot change others' blocks.

        Raises
        ------
        SavedDocumentError
            It is no longer here.
        """
        for at, some in self._pieces(range(first, first + len(blocks))):
            with change(), self._lock:  # so that the memory is not reused during the copy
                rows = self._known(name)
                self._copy(blocks[at : at + len(some)], [rows[one] for one in some], into_pool=True)

    def read(self, name: str, first: int, count: int) -> Iterator[np.ndarray]:
        """Copies of blocks ``first`` to ``first + count`` of a name, uint8 [bytes of a block] each.

        Raises
        ------
        SavedDocumentError
            It is no longer here.
        """
        for at in range(first, first + count):
            with self._lock:
                copied = self._row(self._known(name)[at]).numpy().copy()
            yield copied

    def discard(self, name: str) -> None:
        """Forget a name; nothing happens if it is not here."""
        with self._lock:
            self._free += self._rows.pop(name, [])

    def _known(self, name: str) -> list[int]:
        if name not in self._rows:
            raise SavedDocumentError(f"{name} is no longer in host memory")
        return self._rows[name]

    def _row(self, row: int) -> Tensor:
        return self._slabs[row // self._slab_rows][row % self._slab_rows]

    def _pieces(self, rows: Sequence[int]) -> Iterator[tuple[int, Sequence[int]]]:
        step = max(1, PIECE_BYTES // self._pool.block_bytes)
        return ((at, rows[at : at + step]) for at in range(0, len(rows), step))

    def _copy(self, blocks: Sequence[int], rows: Sequence[int], into_pool: bool) -> None:
        """Copy between blocks and rows, in runs that are consecutive on both sides; blocks until done."""
        device = self._pool.device
        with device.stream(Use.COPIES):
            for start, stop in _runs(blocks, rows, self._slab_rows):
                first = self._slabs[rows[start] // self._slab_rows]
                at = rows[start] % self._slab_rows
                here, there = first[at : at + stop - start], self._pool.bytes_of(blocks[start], stop - start)
                (there if into_pool else here).copy_(here if into_pool else there, non_blocking=True)
            device.finish()


def _runs(blocks: Sequence[int], rows: Sequence[int], slab: int) -> Iterator[tuple[int, int]]:
    """Ranges of positions in which both are consecutive, and rows are in the same slab.

    Examples
    --------
    >>> list(_runs([5, 6, 7, 9], [2, 3, 4, 5], 4))
    [(0, 2), (2, 3), (3, 4)]
    """
    ends = [
        at
        for at in range(1, len(blocks))
        if blocks[at] != blocks[at - 1] + 1 or rows[at] != rows[at - 1] + 1 or rows[at] % slab == 0
    ]
    return pairwise([0, *ends, len(blocks)])
