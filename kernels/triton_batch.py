"""A batch on a GPU whose rows stay the same: buffers are allocated once, and one index tensor is written per step.

Within a layer nothing reads the device, allocates memory or checks arguments. Addresses, grids and constants are the
same in every step, so that layers can be captured in a graph.
"""

from __future__ import annotations

import importlib

import numpy as np
import torch

from .contract import Call, lengths_message, offsets_message, slots_message, tables_message
from .index import Index, Ints
from .triton_plan import MIN_PIECE, Shape, WorkList, aligned
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
        Checked except for values; all tensors on one device. Queries and pools only define the form of later ones.
    index
        The same index tensors, or the host tensors that they were copied from.
    out, lse
        float32 [tokens, heads, d] and [tokens, heads]: memory for the results.

    Raises
    ------
    ValueError
        A length, offset or block id is out of range.
    """

    def __init__(self, call: Call, index: Index, out: torch.Tensor, lse: torch.Tensor) -> None:
        self._jit = importlib.import_module(".triton_jit", __package__)
        self._tables, self._index, self._results = call.block_tables, index, (out, lse)
        tables, lengths, offsets, starts, first_keys = index.read()
        counts = np.ones(len(lengths), np.int64) if offsets is None else np.diff(offsets)
        tokens, heads, d = call.q.shape
        if offsets is not None and (offsets[0] != 0 or offsets[-1] != tokens or (counts < 0).any()):
            raise ValueError(offsets_message(tokens))
        blocks, kv_heads, block_tokens, _ = call.k_pool.shape
        self._limits = tables.shape[1], block_tokens, blocks
        self._usable = ((tables < 0) | (tables >= blocks)).cumsum(1, dtype=np.int64)
        d_v, room = call.v_pool.shape[3], tables.shape[1] * block_tokens
        shape = Shape(counts.tolist(), heads // kv_heads, kv_heads, room, block_tokens, d_v)
        card, self._int8 = card_of(out.device), call.k_scales is not None
        tiles = tiles_for(card.family, d, block_tokens, call.q.dtype, self._int8, call.soft_cap is not None)
        self._work = WorkList(shape, tiles, card.processors)
        self._slots: tuple[torch.Tensor, torch.Tensor] | None = None
        self._soft_cap = call.soft_cap
        self._make_buffers(first_keys is not None)
        self._constants = {
            "GROUP": shape.group, "D": d, "D_PADDED": padded(d), "D_V": d_v, "V_PADDED": padded(d_v),
            "V_TOKEN": call.v_pool.stride(2), "BLOCK_TOKENS": block_tokens,
        }  # fmt: skip
        self._write(lengths, starts, first_keys)

    def _make_buffers(self, windowed: bool) -> None:
        work, out = self._work, self._results[0]
        tokens, heads, d = out.shape
        device, self._windows_at = out.device, aligned(work.size + 2 * tokens)
        self._list = torch.empty(self._windows_at + tokens, dtype=torch.int32, device=device)
        self._windows = self._list[self._windows_at :] if windowed else None
        items = [self._list[launch.at :] for launch in work.launches]
        self._launches = list(zip(work.launches, items, strict=True))
        self._merge_tokens, self._merge_entries = self._list[work.tokens_at :], self._list[work.entries_at :]
        self._list_slots = self._list[work.size :][: 2 * tokens].view(tokens, 2)
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
        """Use the current values of lengths, starts, first keys and slots; queued work keeps earlier ones.

        Raises
        ------
        ValueError
            A length, block id or slot is out of range; nothing was changed.
        """
        _, lengths, _, starts, first_keys = self._index._replace(block_tables=self._index.lengths).read()
        self._write(lengths, starts, first_keys)

    def _write(self, lengths: Ints, starts: Ints | None, first_keys: Ints | None) -> None:
        """Check, write the list into new pinned memory (which torch keeps until it is copied), and queue the copy."""
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
        if first_keys is not None:
            values[self._windows_at :] = first_keys
        self._work.write(values[: self._work.size], lengths, starts, first_keys)
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
        """Queue attention of queries like the prepared ones: at most two launches, and one that merges pieces."""
        out, lse = self._results
        q = q.contiguous()
        kv_heads = k_pool.shape[1]
        upcast = self._jit.INTERPRETED and q.dtype == torch.bfloat16
        cap = self._soft_cap
        factors = (scale * LOG2_E, None) if cap is None else (scale / cap, cap * LOG2_E)
        for launch, items in self._launches:
            self._jit.attend[(launch.items, kv_heads)](
                q, k_pool, v_pool, self._tables, items, self._windows, *scales, out, lse, self._partials,
                self._partial_lse, *factors, kv_heads, self._tables.stride(0), k_pool.stride(0), v_pool.stride(0),
                **self._constants, TILE_ROWS=launch.tiles.rows, TILE_TOKENS=launch.tiles.tokens,
                INT8=self._int8, UPCAST=upcast, **launch.tiles.options(),
            )  # fmt: skip
        if self._work.partials:
            launch_merge((self._partials, self._merge_tokens, self._merge_entries), out, lse)

    def append(self, k: torch.Tensor, v: torch.Tensor | None, k_pool: torch.Tensor, v_pool: torch.Tensor) -> None:
        """Queue one launch that stores new KV [appended, kv_heads, d] of the pool's dtype in the slots.

        If v is None, only keys are stored: values are a part of them.
        """
        appended, kv_heads, d = k.shape
        d_v = v_pool.shape[3]
        if appended:
            self._jit.append[(appended, kv_heads)](
                k.contiguous(), None if v is None else v.contiguous(), k_pool, v_pool, self._list_slots, kv_heads,
                k_pool.stride(0), v_pool.stride(0), D=d, D_PADDED=padded(d), D_V=d_v, V_PADDED=padded(d_v),
                BLOCK_TOKENS=k_pool.shape[2], **APPEND_OPTIONS,
            )  # fmt: skip


def launch_merge(
    partials: tuple[torch.Tensor, torch.Tensor, torch.Tensor], out: torch.Tensor, lse: torch.Tensor
) -> None:
    """Queue the merge of partials, given with their tokens and entries (see ``merge_partials`` in triton_merge.py)."""
    tokens, heads, d = out.shape
    importlib.import_module(".triton_merge", __package__).merge_partials[(tokens, heads)](
        *partials, out, lse, heads, D=d, D_PADDED=padded(d), CHUNK=MERGE_CHUNK, **MERGE_OPTIONS
    )


def warm_up(
    k_pool: torch.Tensor, v_pool: torch.Tensor, heads: int, *, windows: bool = False, soft_cap: float | None = None
) -> None:
    """Compile and load all kernels that batches of a pool will launch, by launches that read and write nothing.

    Parameters
    ----------
    k_pool, v_pool
        [blocks, kv_heads, block_tokens, d].
    heads
        Query heads.
    windows, soft_cap
        Whether batches have first keys, and the soft cap of their scores.
    """
    _, kv_heads, block_tokens, d = k_pool.shape
    device = k_pool.device
    many = 1 + tiles_for(card_of(device).family, d, block_tokens, k_pool.dtype)[0].rows * kv_heads // heads
    q = torch.zeros(1 + many, heads, d, dtype=k_pool.dtype, device=device)
    nothing, offsets = torch.zeros(2, dtype=torch.int32), torch.tensor([0, 1, 1 + many], dtype=torch.int32)
    first_keys = torch.zeros(1 + many, dtype=torch.int32) if windows else None
    table = torch.zeros(2, -(-2 * MIN_PIECE // block_tokens), dtype=torch.int32)
    index = Index(table, nothing, offsets, None, first_keys)
    there = index.on(device)
    call = Call(
        q, k_pool, v_pool, there.block_tables, there.lengths, 1.0, there.query_offsets, False, None, None, None, 1,
        there.first_keys, soft_cap,
    )  # fmt: skip
    batch = TritonBatch(call, index, *call.empty_result())
    fresh_k, fresh_v = (
        torch.zeros(1, *pool.shape[1::2], dtype=k_pool.dtype, device=device) for pool in (k_pool, v_pool)
    )
    batch.append(fresh_k, None if call.values_in_keys else fresh_v, k_pool, v_pool)
    batch.attend(q, k_pool, v_pool, 1.0)
