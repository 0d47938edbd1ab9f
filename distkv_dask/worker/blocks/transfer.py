"""Moves of blocks between pools while both workers compute: copying at the source, expected moves at the target.

Bytes go over Dask's own comm from worker to worker (encrypted if the cluster's comms are), not on the lanes. A block of
the pool is one contiguous piece of memory and full blocks never change, so pieces of it are sent as they are. A target
refuses pieces that it does not expect, or no longer expects: a late piece is never written into another sequence's
block.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import numpy as np

from distkv_dask.errors import GangAbortedError
from distkv_dask.messages.names import Piece, Transfer
from distkv_dask.worker.blocks.pool import Pool


class Arrivals:
    """Moves that a worker is the target of.

    Parameters
    ----------
    pool
        The pool of the target.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        self._expected: dict[Transfer, tuple[int, int]] = {}

    def expect(self, transfer: Transfer, sequence: int, start: int, stop: int) -> None:
        """Allocate blocks for tokens ``[start, stop)`` of a moving sequence.

        Raises
        ------
        CapacityError
            There is no room for them.
        """
        self._pool.reserve(sequence, start, stop)
        with self._lock:
            self._expected[transfer] = sequence, start // self._pool.block_tokens

    def store_piece(self, piece: Piece, data: np.ndarray) -> None:
        """Store a received piece, uint8 [bytes].

        Raises
        ------
        GangAbortedError
            Its transfer is not, or no longer, expected here.
        """
        with self._lock:
            if piece.transfer not in self._expected:
                raise GangAbortedError(f"{piece.transfer} is not expected on this worker")
            sequence, first = self._expected[piece.transfer]
            start = (first + piece.block) * self._pool.block_tokens
            (block,) = self._pool.find(sequence, [(start, start + 1)])
            self._pool.fill(block, data, piece.offset)
            if piece.last:
                del self._expected[piece.transfer]

    def drop(self, sequence: int) -> None:
        """Refuse further pieces of a sequence."""
        with self._lock:
            self._expected = {name: one for name, one in self._expected.items() if one[0] != sequence}


async def send_blocks(
    pool: Pool,
    transfer: Transfer,
    sequence: int,
    tokens: range,
    send: Callable[[Piece, np.ndarray], Awaitable[object]],
    per_step: int,
    pace: float,
) -> None:
    """Send the blocks of a range of tokens, piece by piece, each after the previous one was accepted.

    Parameters
    ----------
    pool, sequence, tokens
        What to send.
    transfer
        What they are sent for.
    send
        Sends a piece.
    per_step
        Tokens whose KV is sent in ``pace`` seconds at most; a piece is no larger than that.
    pace
        Seconds of a decode step; 0 sends as fast as pieces are taken, a block at a time.

    Raises
    ------
    CapacityError
        Some of the blocks are not here.
    """
    size = pool.block_bytes

    async def read(block: int, start: int, stop: int) -> np.ndarray:
        if pool.device.is_host:
            return pool.read_piece(block, start, stop)
        return await asyncio.get_running_loop().run_in_executor(None, pool.read_piece, block, start, stop)

    count = min(pool.block_tokens, per_step) if pace else pool.block_tokens
    step = -(-size * count // pool.block_tokens)
    blocks = pool.find(sequence, [(tokens.start, tokens.stop)])
    due = asyncio.get_running_loop().time()
    for at, block in enumerate(blocks):
        for offset in range(0, size, step):
            now = asyncio.get_running_loop().time()
            if due > now:
                await asyncio.sleep(due - now)
            last = block == blocks[-1] and offset + step >= size
            data = await read(block, offset, min(offset + step, size))
            await send(Piece(transfer, at, offset, last), data)
            due = max(due, now) + pace * count / per_step
