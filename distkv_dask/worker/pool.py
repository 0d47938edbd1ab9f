"""The KV pool: preallocated rBlocks of one worker and the block table of each sequence (paper section 4)."""

from __future__ import annotations

import math
import threading

import numpy as np
import torch

from distkv_dask.errors import CapacityError
from distkv_dask.kernels import advise_huge_pages


class Pool:
    """Block storage of one worker for one model.

    The storage is one tensor [blocks, layers, 2, kv_heads, block_tokens, head_dim]: a block's KV of all layers is
    contiguous, so that moving, saving or lending a block is one copy. The pool knows which blocks belong to which
    sequence but never how many tokens are in them: lengths live in the ledger and travel in plans, and KV past the
    committed length does not exist.

    Parameters
    ----------
    layers, kv_heads, head_dim
        The model's attention geometry.
    dtype
        Name of the element type, for instance ``"bfloat16"``.
    block_tokens
        Tokens in a block.
    blocks
        Number of blocks to allocate.
    """

    def __init__(
        self, *, layers: int, kv_heads: int, head_dim: int, dtype: str, block_tokens: int, blocks: int
    ) -> None:
        self.layers = layers
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.block_tokens = block_tokens
        self.capacity_blocks = blocks
        shape = (blocks, layers, 2, kv_heads, block_tokens, head_dim)
        # numpy's zeros take no memory until they are written to; torch's would touch all of a large pool at once
        zeros = np.zeros(math.prod(shape) * self.dtype.itemsize, np.uint8)
        self.storage = torch.from_numpy(zeros).view(self.dtype).view(shape)
        advise_huge_pages(self.storage)
        self._keys = [self.storage[:, layer, 0] for layer in range(layers)]
        self._values = [self.storage[:, layer, 1] for layer in range(layers)]
        self._key_rows = [view.transpose(1, 2) for view in self._keys]
        self._value_rows = [view.transpose(1, 2) for view in self._values]
        self._lock = threading.Lock()
        self._runs = {0: blocks} if blocks else {}
        self._tables: dict[int, tuple[int, ...]] = {}

    @staticmethod
    def block_bytes(*, layers: int, kv_heads: int, head_dim: int, dtype: str, block_tokens: int) -> int:
        """Bytes of one block: keys and values of ``block_tokens`` tokens in all layers."""
        element: torch.dtype = getattr(torch, dtype)
        return layers * 2 * kv_heads * block_tokens * head_dim * element.itemsize

    def keys(self, layer: int) -> torch.Tensor:
        """Keys of a layer, a view [blocks, kv_heads, block_tokens, head_dim]."""
        return self._keys[layer]

    def values(self, layer: int) -> torch.Tensor:
        """Values of a layer, a view [blocks, kv_heads, block_tokens, head_dim]."""
        return self._values[layer]

    def write(
        self, layer: int, slots: tuple[torch.Tensor, torch.Tensor], keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Store new tokens' KV of a layer.

        Parameters
        ----------
        layer
            Index of the layer.
        slots
            int64 [n] block ids and int64 [n] offsets within them, as :meth:`slots` gives for positions.
        keys, values
            [n, kv_heads, head_dim] in the pool's dtype.
        """
        self._key_rows[layer].index_put_(slots, keys)
        self._value_rows[layer].index_put_(slots, values)

    def slots(self, sequence: int, start: int, stop: int) -> tuple[list[int], list[int]]:
        """Block ids and offsets of a sequence's tokens ``start`` to ``stop``, counted from its first one here."""
        table, size = self.table(sequence), self.block_tokens
        return [table[at // size] for at in range(start, stop)], [at % size for at in range(start, stop)]

    @property
    def used_blocks(self) -> int:
        """Number of blocks that belong to sequences."""
        with self._lock:
            return sum(map(len, self._tables.values()))

    def table(self, sequence: int) -> tuple[int, ...]:
        """Block ids of a sequence in order; empty when it has nothing here."""
        return self._tables.get(sequence, ())

    def reserve(self, sequence: int, tokens: int) -> None:
        """Make sure that a sequence has room for ``tokens`` tokens here; blocks that it has already are kept.

        Raises
        ------
        CapacityError
            Not enough blocks are free; nothing was changed.
        """
        with self._lock:
            table = self._tables.get(sequence, ())
            wanted = -(-tokens // self.block_tokens) - len(table)
            free = sum(self._runs.values())
            if wanted > free:
                size = self.storage[0].nbytes
                raise CapacityError(
                    f"{wanted} more KV blocks ({wanted * size} bytes) needed on this worker, {free} "
                    f"({free * size} bytes) are free; raise distkv.kv-memory or send fewer requests at once"
                )
            while wanted > 0:
                run = self._take(wanted, after=table[-1] + 1 if table else None)
                table += tuple(run)
                wanted -= len(run)
            self._tables[sequence] = table

    def release(self, sequence: int) -> None:
        """Free the blocks of a sequence; nothing happens when it has none."""
        with self._lock:
            for block in self._tables.pop(sequence, ()):
                self._runs[block] = 1
            merged: dict[int, int] = {}
            last = None
            for start in sorted(self._runs):
                if last is not None and last + merged[last] == start:
                    merged[last] += self._runs[start]
                else:
                    merged[start], last = self._runs[start], start
            self._runs = merged

    def _take(self, wanted: int, after: int | None) -> range:
        """Take up to ``wanted`` consecutive blocks: the table's own continuation, else the best fitting free run."""
        if after is not None and after in self._runs:
            start = after
        else:
            fitting = [run for run, count in self._runs.items() if count >= wanted]
            start = min(fitting, key=lambda run: (self._runs[run], run)) if fitting else self._largest()
        count = self._runs.pop(start)
        taken = min(count, wanted)
        if taken < count:
            self._runs[start + taken] = count - taken
        return range(start, start + taken)

    def _largest(self) -> int:
        return max(self._runs, key=lambda run: (self._runs[run], -run))
