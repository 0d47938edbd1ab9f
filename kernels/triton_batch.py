"""A batch on a GPU whose rows stay the same: buffers are made once, and one index tensor is written per step.

Nothing here reads the device, allocates or checks within a layer: addresses, grids and constants are the same from
step to step, so that layers may be captured in a graph.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch

from .contract import Call, lengths_message, offsets_message, slots_message, tables_message
from .index import Index, Ints
from .triton_plan import MIN_PIECE, Shape, WorkList
from .triton_tiles import card_of, padded, tiles_for

LOG2_E = 1.4426950408889634
MERGE_CHUNK = 8
MERGE_OPTIONS = {"num_warps": 2, "num_stages": 1, "enable_fp_fusion": True}
APPEND_OPTIONS = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": True}


class TritonBatch:
    """Attention and appending for a batch.

    Parameters
    ----------
    call
        Checked but for values; all tensors on one device. Queries and pools only say what later ones are like.
    index
        The same index tensors, or those of the host that they were copied from.
    out, lse
        float32 [tokens, heads, d] and [tokens, heads]: take the results.

    Raises
    ------
    ValueError
        A length, offset or block id is out of range.
    """

    def __init__(self, call: Call, index: Index, out: torch.Tensor, lse: torch.Tensor) -> None:
        if not call.plain:
            raise ValueError("first_keys, soft_cap, v_pool: Triton serves no windows, soft caps or short values yet")
        self._jit = importlib.import_module(".triton_jit", __package__)
        self._tables, self._index, self._results = call.block_tables, index, (out, lse)
        tables, lengths, offsets, starts, _ = index.read()
        counts = np.ones(len(lengths), np.int64) if offsets is None else np.diff(offsets)
        tokens, heads, d = call.q.shape
        if offsets is not None and (offsets[0] != 0 or offsets[-1] != tokens or (counts < 0).any()):
            raise ValueError(offsets_message(tokens))
        blocks, kv_heads, block_tokens, _ = call.k_pool.shape
        self._limits = tables.shape[1], block_tokens, blocks
        self._usable = ((tables < 0) | (tables >= blocks)).cumsum(1, dtype=np.int64)
        shape = Shape(counts.tolist(), heads // kv_heads, kv_heads, tables.shape[1] * block_tokens, block_tokens, d)
        card, self._int8 = card_of(out.device), call.k_scales is not None
        tiles = tiles_for(card.family, d, block_tokens, call.q.dtype, self._int8)
        self._work = WorkList(shape, tiles, card.processors)
        self._slots: tuple[torch.Tensor, torch.Tensor] | None = None
        self._make_buffers(tokens, heads, d)
        self._constants = {"GROUP": shape.group, "D": d, "D_PADDED": padded(d), "BLOCK_TOKENS": block_tokens}
        self._write(lengths, starts)

    def _make_buffers(self, tokens: int, heads: int, d: int) -> None:
        work, device = self._work, self._results[0].device
        self._list = torch.empty(work.size + 2 * tokens, dtype=torch.int32, device=device)
        items = [self._list[launch.at :] for launch in work.launches]
        self._launches = list(zip(work.launches, items, strict=True))
        self._merge_tokens, self._merge_entries = self._list[work.tokens_at :], self._list[work.entries_at :]
        self._list_slots = self._list[work.size :].view(tokens, 2)
        lse_at = work.partials * heads * d
        self._partials = torch.empty(lse_at + work.partials * heads, dtype=torch.float32, device=device)
        self._partial_lse = self._partials[lse_at:] if work.partials else self._partials

    def take_slots(self, blocks: torch.Tensor, offsets: torch.Tensor) -> None:
        """Let :meth:`append` store KV in slots int64 [appended], on the host or the device.

        Raises
        ------
        ValueError
            A slot lies outside the pool.
        """
        self._slots = blocks, offsets
        self.refresh()

    def refresh(self) -> None:
        """Take the values of lengths, starts and slots as they are now; what is queued already uses the earlier ones.

        Raises
        ------
        ValueError
            A length, block id or slot is out of range; nothing was changed.
        """
        _, lengths, _, starts, _ = self._index._replace(block_tables=self._index.lengths).read()
        self._write(lengths, starts)

    def _write(self, lengths: Ints, starts: Ints | None) -> None:
        """Check, write the list in pinned memory of its own (which torch keeps until it was copied), queue the copy."""
        width, block_tokens, blocks = self._limits
        if len(lengths) and (lengths.min() < 0 or lengths.max() > width * block_tokens):
            raise ValueError(lengths_message(width, block_tokens))
        reached = np.flatnonzero(lengths)
        if self._usable[reached, -(-lengths[reached] // block_tokens) - 1].any():
            raise ValueError(tables_message(blocks))
        on_card = self._list.device.type != "cpu"
        host = torch.empty(self._list.shape, dtype=torch.int32, pin_memory=on_card)
        values = host.numpy()
        values[self._work.size :] = -1
        if self._slots is not None:
            values[self._work.size :][: 2 * len(self._slots[0])] = self._read_slots(*self._slots)
        self._work.write(values[: self._work.size], lengths, starts)
        self._list.copy_(host, non_blocking=True)

    def _read_slots(self, blocks: torch.Tensor, offsets: torch.Tensor) -> Ints:
        slots: Ints = torch.stack((blocks, offsets), 1).cpu().numpy()
        _, block_tokens, count = self._limits
        if len(slots) and (slots.min() < 0 or slots[:, 0].max() >= count or slots[:, 1].max() >= block_tokens):
            raise ValueError(slots_message())
        return slots.reshape(-1)

    def attend(
        self, q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, scale: float,
        scales: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    ) -> None:  # fmt: skip
        """Queue attention of queries like those prepared for; at most two launches, and one that merges pieces."""
        out, lse = self._results
        q = q.contiguous()
        kv_heads = k_pool.shape[1]
        upcast = self._jit.INTERPRETED and q.dtype == torch.bfloat16
        for launch, items in self._launches:
            self._jit.attend[(launch.items, kv_heads)](
                q, k_pool, v_pool, self._tables, items, *scales, out, lse, self._partials, self._partial_lse,
                scale * LOG2_E, kv_heads, self._tables.stride(0), k_pool.stride(0), v_pool.stride(0),
                **self._constants, TILE_ROWS=launch.tiles.rows, TILE_TOKENS=launch.tiles.tokens,
                INT8=self._int8, UPCAST=upcast, **launch.tiles.options(),
            )  # fmt: skip
        if self._work.partials:
            launch_merge(self._jit, (self._partials, self._merge_tokens, self._merge_entries), out, lse)

    def append(self, k: torch.Tensor, v: torch.Tensor | None, k_pool: torch.Tensor, v_pool: torch.Tensor) -> None:
        """Queue one launch that stores new KV [appended, kv_heads, d] of the pool's dtype in the slots."""
        appended, kv_heads, d = k.shape
        if appended and v is not None:
            self._jit.append[(appended, kv_heads)](
                k.contiguous(), v.contiguous(), k_pool, v_pool, self._list_slots, kv_heads, k_pool.stride(0),
                v_pool.stride(0), D=d, D_PADDED=padded(d), BLOCK_TOKENS=k_pool.shape[2], **APPEND_OPTIONS,
            )  # fmt: skip


def launch_merge(
    jit: Any, partials: tuple[torch.Tensor, torch.Tensor, torch.Tensor], out: torch.Tensor, lse: torch.Tensor
) -> None:
    """Queue the merge of partials, given with their tokens and entries (see ``merge_partials`` in triton_jit.py)."""
    tokens, heads, d = out.shape
    jit.merge_partials[(tokens, heads)](
        *partials, out, lse, heads, D=d, D_PADDED=padded(d), CHUNK=MERGE_CHUNK, **MERGE_OPTIONS
    )


def warm_up(k_pool: torch.Tensor, heads: int) -> None:
    """Compile and load all that batches of a pool will launch, by launches that read and write nothing.

    Parameters
    ----------
    k_pool
        [blocks, kv_heads, block_tokens, d].
    heads
        Query heads.
    """
    _, kv_heads, block_tokens, d = k_pool.shape
    device = k_pool.device
    many = 1 + tiles_for(card_of(device).family, d, block_tokens, k_pool.dtype)[0].rows * kv_heads // heads
    q = torch.zeros(1 + many, heads, d, dtype=k_pool.dtype, device=device)
    nothing, offsets = torch.zeros(2, dtype=torch.int32), torch.tensor([0, 1, 1 + many], dtype=torch.int32)
    index = Index(torch.zeros(2, -(-2 * MIN_PIECE // block_tokens), dtype=torch.int32), nothing, offsets, None)
    tables, lengths, offsets_there, *_ = index.on(device)
    call = Call(q, k_pool, k_pool, tables, lengths, 1.0, offsets_there, False, None, None, None, 1)
    batch = TritonBatch(call, index, torch.empty_like(q, dtype=torch.float32), q.new_empty(q.shape[:2]).float())
    fresh = torch.zeros(1, kv_heads, d, dtype=k_pool.dtype, device=device)
    batch.append(fresh, fresh, k_pool, k_pool)
    batch.attend(q, k_pool, k_pool, 1.0)
