"""MicroAttention on GPUs: chooses tiles and splits, and launches the Triton kernels of triton_jit.py."""

from __future__ import annotations

import importlib
import operator
import threading
from typing import Any, NamedTuple

import torch

from .contract import Call, check_values

MAX_SPLITS = 64
SPLIT_TOKENS = 256  # a split is worth its merge from about so many tokens
LOG2_E = 1.4426950408889634


class Tiles(NamedTuple):
    """Launch parameters: query rows and tokens of a tile, warps, pipeline stages."""

    rows: int
    tokens: int
    warps: int
    stages: int

    def options(self) -> dict[str, Any]:
        """What the compiler is told; fused multiply-add only makes scores more exact."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


# The tuning table, by (few query rows, padded head dim); one place for all devices. test_triton_compile.py holds the
# registers, spills and shared memory of its entries on sm_80, sm_90 and gfx942.
TILES = {
    (True, 16): Tiles(16, 128, 4, 2),
    (True, 32): Tiles(16, 128, 4, 2),
    (True, 64): Tiles(16, 128, 4, 2),
    (True, 128): Tiles(16, 64, 4, 2),
    (True, 256): Tiles(16, 32, 4, 2),
    (False, 16): Tiles(128, 64, 4, 2),
    (False, 32): Tiles(128, 64, 4, 2),
    (False, 64): Tiles(128, 64, 8, 2),
    (False, 128): Tiles(128, 64, 8, 2),
    (False, 256): Tiles(64, 32, 8, 1),
}
MERGE_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
FLOAT32_TILES = Tiles(16, 32, 8, 1)  # float32 products run on no tensor core and need many registers
# Conversions of int8 take registers, of which prefill on gfx942 has none to spare.
INT8_PREFILL_TOKENS = {16: 32, 32: 32, 64: 32, 128: 32, 256: 16}

_checked = threading.local()


def unsupported(device_type: str, block_tokens: int) -> str | None:
    """Why Triton cannot serve pools on a device, or None if it can."""
    if device_type != "cuda":
        return f"Triton serves GPUs, not {device_type}"
    if block_tokens & (block_tokens - 1):
        return f"Triton needs blocks of a power of two tokens, not {block_tokens}"
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton is not installed ({error}); install distkv-dask[gpu]"
    return None


def tiles_for(query_rows: int, head_dim: int, dtype: torch.dtype, int8: bool) -> Tiles:
    """Entry of the tuning table for a number of query rows (queries times group) of one kv head."""
    if dtype == torch.float32:
        return FLOAT32_TILES
    few, width = query_rows <= 16, padded(head_dim)
    tiles = TILES[few, width]
    return tiles._replace(tokens=INT8_PREFILL_TOKENS[width]) if int8 and not few else tiles


def padded(head_dim: int) -> int:
    """Head dim as Triton's tiles need it: a power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def run(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend on a GPU (or in Triton's interpreter); see :func:`distkv_dask.kernels.micro_attention`."""
    jit = importlib.import_module(".triton_jit", __package__)
    interpreted = call.q.device.type == "cpu"
    queries, longest = _limits(call)
    q = call.q.contiguous()
    tokens, heads, d = q.shape
    kv_heads, block_tokens = call.k_pool.shape[1:3]
    group, rows = heads // kv_heads, len(call.lengths)
    tiles = tiles_for(queries * group, d, q.dtype, call.k_scales is not None)
    programs = -(-queries * group // tiles.rows)
    splits = _splits(programs * kv_heads * rows, longest, q.device)
    out = q.new_empty((splits, tokens, heads, d), dtype=torch.float32)
    lse = q.new_empty((splits, tokens, heads), dtype=torch.float32)
    if tokens == 0:
        return out[0], lse[0]
    grid = (programs * splits, kv_heads, rows)
    jit.attend[grid](
        q, call.k_pool, call.v_pool, call.block_tables, call.lengths,
        call.lengths if call.query_offsets is None else call.query_offsets,
        call.lengths if call.q_start is None else call.q_start,
        call.k_scales, call.v_scales, out, lse, call.scale * LOG2_E, tokens, kv_heads,
        call.block_tables.stride(0), call.k_pool.stride(0), call.v_pool.stride(0),
        GROUP=group, D=d, D_PADDED=padded(d), BLOCK_TOKENS=block_tokens, TILE_ROWS=tiles.rows,
        TILE_TOKENS=tiles.tokens, SPLITS=splits, RAGGED=call.query_offsets is not None, CAUSAL=call.causal,
        INT8=call.k_scales is not None, UPCAST=interpreted and q.dtype == torch.bfloat16,
        **tiles.options(),
    )  # fmt: skip
    if splits == 1:
        return out[0], lse[0]
    merged_out, merged_lse = torch.empty_like(out[0]), torch.empty_like(lse[0])
    jit.merge_splits[(tokens * heads,)](
        out, lse, merged_out, merged_lse, tokens * heads,
        D=d, D_PADDED=padded(d), SPLITS=splits, SPLITS_PADDED=1 << (splits - 1).bit_length(), **MERGE_OPTIONS,
    )  # fmt: skip
    return merged_out, merged_lse


def _splits(programs: int, longest: int, device: torch.device) -> int:
    """Pieces to cut every row into, so that all processors of the device have work: a power of two."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    wanted = min(2 * processors // max(programs, 1), longest // SPLIT_TOKENS, MAX_SPLITS)
    return 1 << (wanted.bit_length() - 1) if wanted > 1 else 1


def _limits(call: Call) -> tuple[int, int]:
    """Most queries of a row and greatest length; checks all index values on the way.

    Reading index tensors stops the GPU's queue, so the answer is kept for the layers of a step: they pass the very same
    tensors, unchanged.
    """
    index = (call.block_tables, call.lengths, call.query_offsets, call.q_start)
    shape = (call.q.shape[0], call.k_pool.shape[0], call.k_pool.shape[2])
    versions = tuple(0 if x is None or x.is_inference() else x._version for x in index)
    memory: dict[str, Any] = _checked.__dict__
    known = memory.get("index")
    if known is not None and memory["rest"] == (shape, versions) and all(map(operator.is_, known, index)):
        answer: tuple[int, int] = memory["answer"]
        return answer
    check_values(call)
    some = call.lengths.numel() > 0
    queries = int(call.query_offsets.diff().max()) if some and call.query_offsets is not None else 1
    answer = (queries, int(call.lengths.max()) if some else 0)
    if not any(x is not None and x.is_inference() for x in index):
        memory.update(index=index, rest=(shape, versions), answer=answer)
    return answer
