"""The KV pool: preallocated rBlocks of one worker and the block table of each sequence (paper section 4).

A block table maps a sequence's *logical* blocks (number ``n`` holds the tokens from ``n * block_tokens`` on) to blocks
of the pool. A worker has the logical blocks of its spans, anywhere in the sequence. Old and new placements of a moving
sequence are read through the same table.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from distkv_dask.errors import CapacityError, DeviceError, PlanError, in_words
from distkv_dask.geometry import Geometry, LayerKind
from distkv_dask.kernels import advise_huge_pages
from distkv_dask.worker.device import HOST, Device


@dataclass(frozen=True, slots=True)
class BlockShape:
    """The content of a block: keys and values of ``block_tokens`` tokens in all layers.

    ``dtype`` is the name of the element type, for instance ``"bfloat16"``; ``layer_kinds`` says what each layer sees;
    it is empty if all see everything. If ``latent_dim`` is not 0, values are the first numbers of the keys.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    block_tokens: int
    layer_kinds: tuple[LayerKind, ...] = ()
    latent_dim: int = 0

    @classmethod
    def of(cls, geometry: Geometry, block_tokens: int, layers: Sequence[int] | None = None) -> BlockShape:
        """Blocks for some layers of a model; by default for those whose KV may be on any worker."""
        layers = geometry.far_layers if layers is None else layers
        kinds = tuple(geometry.layer_kinds[layer] for layer in layers) if geometry.layer_kinds else ()
        sizes = len(layers), geometry.kv_heads, geometry.head_dim, geometry.dtype
        return cls(*sizes, block_tokens, kinds, geometry.latent_dim)

    @property
    def planes(self) -> int:
        """2 for keys and values, 1 if values are part of the keys."""
        return 1 if self.latent_dim else 2

    @property
    def nbytes(self) -> int:
        """Bytes of one block."""
        element: torch.dtype = getattr(torch, self.dtype)
        return self.layers * self.planes * self.kv_heads * self.block_tokens * self.head_dim * element.itemsize


class Pool:
    """Block storage of one worker for one model.

    The storage is one tensor [blocks, layers, planes, kv_heads, block_tokens, head_dim], of keys and values, or of keys
    that contain the values: a block's KV of all layers is contiguous, so that moving, saving or lending a block is one
    copy. The pool knows which blocks belong to which sequence, but not how many tokens are in them: lengths are in the
    ledger and in plans, and KV past the committed length is not valid.

    Parameters
    ----------
    block
        The content of a block.
    blocks
        Number of blocks to allocate.
    device
        The device that has the memory.

    Raises
    ------
    DeviceError
        A card does not have enough contiguous memory.
    """

    def __init__(self, block: BlockShape, blocks: int, device: Device = HOST) -> None:
        self.device = device
        self.layer_kinds = block.layer_kinds or (LayerKind(),) * block.layers
        self.layers = block.layers
        self.kv_heads = block.kv_heads
        self.head_dim = block.head_dim
        self.value_dim = block.latent_dim or block.head_dim
        self.planes = block.planes
        self.latent_dim = block.latent_dim
        self.dtype: torch.dtype = getattr(torch, block.dtype)
        self.block_tokens = block.block_tokens
        self.capacity_blocks = blocks
        shape = (blocks, block.layers, block.planes, block.kv_heads, block.block_tokens, block.head_dim)
        self.block_bytes = block.nbytes
        self.storage = _zeros(shape, self.dtype, device)
        self._bytes = self.storage.view(blocks, -1).view(torch.uint8) if blocks else torch.empty(0, 0).byte()
        advise_huge_pages(self.storage)
        self._keys = [self.storage[:, layer, 0] for layer in range(block.layers)]
        self._values = [self.storage[:, layer, -1, ..., : self.value_dim] for layer in range(block.layers)]
        self._key_rows = [view.transpose(1, 2) for view in self._keys]
        self._value_rows = [view.transpose(1, 2) for view in self._values]
        self._lock = threading.Lock()
        self._runs = {0: blocks} if blocks else {}
        self._tables: dict[int, dict[int, int]] = {}
        self._sharers: Counter[int] = Counter()

    def keys(self, layer: int) -> torch.Tensor:
        """Keys of a layer, a view [blocks, kv_heads, block_tokens, head_dim]."""
        return self._keys[layer]

    def values(self, layer: int) -> torch.Tensor:
        """Values of a layer, a view [blocks, kv_heads, block_tokens, value_dim]."""
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
            [n, kv_heads, head_dim] and [n, kv_heads, value_dim] in the pool's dtype.
        """
        self._key_rows[layer].index_put_(slots, keys)
        self._value_rows[layer].index_put_(slots, values)

    def read(self, blocks: Sequence[int]) -> np.ndarray[Any, Any]:
        """Bytes of blocks, uint8 [n, bytes of a block]; on the host, consecutive blocks are not copied."""
        run = range(blocks[0], blocks[0] + len(blocks)) if blocks else range(0)
        if list(blocks) == list(run):
            return self.device.read(self._bytes[run.start : run.stop])
        return np.concatenate([self.device.read(self._bytes[block : block + 1]) for block in blocks])

    def bytes_of(self, block: int, count: int) -> torch.Tensor:
        """Memory of consecutive blocks, uint8 [count, bytes of a block]."""
        return self._bytes[block : block + count]

    def read_piece(self, block: int, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Bytes ``[start, stop)`` of a block, uint8; on the host, its memory itself."""
        return self.device.read(self._bytes[block, start:stop])

    def fill(self, block: int, data: np.ndarray[Any, Any], start: int = 0) -> None:
        """Overwrite a block from its byte ``start`` on; ``data`` is uint8 [n]."""
        self.device.write(self._bytes[block, start : start + len(data)], data)

    def slots(self, table: Sequence[int], start: int, stop: int) -> tuple[list[int], list[int]]:
        """Block ids and offsets of tokens ``start`` to ``stop``, counted from the first token of the table."""
        size = self.block_tokens
        return [table[at // size] for at in range(start, stop)], [at % size for at in range(start, stop)]

    @property
    def used_blocks(self) -> int:
        """Number of blocks that belong to sequences."""
        with self._lock:
            return sum(map(len, self._tables.values())) - self._sharers.total()

    def table(self, sequence: int) -> tuple[int, ...]:
        """Ids of all blocks that a sequence has here, in the order of its tokens."""
        with self._lock:
            return tuple(block for _, block in sorted(self._tables.get(sequence, {}).items()))

    def find(self, sequence: int, spans: Iterable[tuple[int, int]]) -> list[int]:
        """Block ids of token ranges ``[start, stop)`` of a sequence, in order.

        All ranges start, and all but the last end, on a block border, so that tokens have no gaps.

        Raises
        ------
        PlanError
            The sequence has no such blocks here.
        """
        table, spans = self._tables.get(sequence, {}), list(spans)
        borders = [end for span in spans for end in span][:-1]
        blocks = [table.get(at) for start, stop in spans for at in self._logical(start, stop)]
        if any(end % self.block_tokens for end in borders) or None in blocks:
            raise PlanError(
                f"tokens {spans} of sequence {sequence} were planned on this worker, which has no blocks of "
                f"{self.block_tokens} tokens for just these; this is a fault of the plan, please report it",
                sequence,
            )
        return cast(list[int], blocks)

    def reserve(self, sequence: int, start: int, stop: int) -> None:
        """Ensure that a sequence has room for its tokens ``[start, stop)``; existing blocks are kept.

        Raises
        ------
        CapacityError
            Not enough blocks are free; nothing was changed.
        """
        with self._lock:
            table = dict(self._tables.get(sequence, {}))
            missing = [at for at in self._logical(start, stop) if at not in table]
            free = sum(self._runs.values())
            if len(missing) > free:
                size = self.block_bytes
                raise CapacityError(
                    f"{len(missing)} more KV blocks ({len(missing) * size} bytes) needed on this worker, {free} "
                    f"({free * size} bytes) are free; raise distkv.kv-memory or send fewer requests at once"
                )
            while missing:
                before = table.get(missing[0] - 1)
                run = self._take_run(len(missing), after=None if before is None else before + 1)
                table.update(zip(missing, run, strict=False))
                del missing[: len(run)]
            if table:
                self._tables[sequence] = table  # a new dict: lanes may be reading the old one

    def share(self, source: int, sequence: int, start: int, stop: int) -> None:
        """Share the blocks of tokens ``[start, stop)`` with another sequence, which has none of them.

        Raises
        ------
        PlanError
            The source has no such blocks here.
        """
        with self._lock:
            blocks = self.find(source, [(start, stop)])
            self._sharers.update(blocks)
            table = {**self._tables.get(sequence, {}), **dict(zip(self._logical(start, stop), blocks, strict=True))}
            if table:
                self._tables[sequence] = table

    def free(self, sequence: int, start: int, stop: int) -> None:
        """Free a sequence's blocks of tokens ``[start, stop)`` on this worker."""
        with self._lock:
            table = self._tables.get(sequence, {})
            gone = self._logical(start, stop)
            kept = {at: block for at, block in table.items() if at not in gone}
            self._give_back(block for at, block in table.items() if at in gone)
            if kept:
                self._tables[sequence] = kept
            else:
                self._tables.pop(sequence, None)

    def release_sequence(self, sequence: int) -> None:
        """Free all blocks of a sequence; no error if it has none."""
        with self._lock:
            self._give_back(self._tables.pop(sequence, {}).values())

    def _logical(self, start: int, stop: int) -> range:
        """Logical blocks of the tokens ``[start, stop)``."""
        return range(start // self.block_tokens, -(-stop // self.block_tokens) if stop > start else 0)

    def _give_back(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            if self._sharers[block]:
                self._sharers[block] -= 1
            else:
                self._runs[block] = 1
        merged: dict[int, int] = {}
        last = None
        for start in sorted(self._runs):
            if last is not None and last + merged[last] == start:
                merged[last] += self._runs[start]
            else:
                merged[start], last = self._runs[start], start
        self._runs = merged

    def _take_run(self, wanted: int, after: int | None) -> range:
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


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: Device) -> torch.Tensor:
    """Contiguous memory."""
    if device.is_host:  # numpy's arrays take no memory until they are written to; torch would touch all pages at once
        return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
    try:
        made = torch.zeros(shape, dtype=dtype, device=device.torch)
    except torch.OutOfMemoryError as error:
        free, total = device.memory()
        raise DeviceError(
            f"the KV pool needs {math.prod(shape) * dtype.itemsize} bytes in one piece, but {device.name} has "
            f"{free} of {total} bytes left: lower kv_memory (distkv.kv-memory). {in_words(error)}"
        ) from error
    device.finish()  # lanes have separate streams
    return made
