"""The Triton device code of MicroAttention: split-KV attention over paged blocks, and the merge of its splits.

One kernel serves decode, prefill and shared prefixes. The queries of a row and the heads of a group are packed into
the rows of a tile (row = query * group + head of the group), so that grouped heads fill a tensor-core tile and keys are
read once for all of them. The host side is triton_kernel.py.
"""

# Arguments of device code have no Python types.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend(
    q_ptr,
    k_ptr,
    v_ptr,
    tables_ptr,
    lengths_ptr,
    offsets_ptr,
    starts_ptr,
    k_scales_ptr,
    v_scales_ptr,
    out_ptr,
    lse_ptr,
    scale_log2,
    tokens,
    kv_heads,
    table_stride,
    k_block_stride,
    v_block_stride,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    RAGGED: tl.constexpr,
    CAUSAL: tl.constexpr,
    INT8: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One (tile of query rows, split) of one kv head of one row; grid (tiles * SPLITS, kv_heads, rows).

    out float32 [SPLITS, tokens, heads, D] and lse float32 [SPLITS, tokens, heads]; scale_log2 includes log2(e).
    UPCAST multiplies in float32: the interpreter's bfloat16 dot is broken.
    """
    tile = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    head = tl.program_id(1)
    row = tl.program_id(2)
    first = row
    count = 1
    if RAGGED:
        first = tl.load(offsets_ptr + row)
        count = tl.load(offsets_ptr + row + 1) - first
    if tile * TILE_ROWS >= count * GROUP:
        return

    packed = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    query = packed // GROUP
    valid = query < count
    dims = tl.arange(0, D_PADDED)
    real = dims < D
    flat = (first + query).to(tl.int64) * (kv_heads * GROUP) + head * GROUP + packed % GROUP
    q = tl.load(q_ptr + flat[:, None] * D + dims[None, :], mask=valid[:, None] & real[None, :], other=0.0)

    end = tl.load(lengths_ptr + row)
    limit = query
    if CAUSAL:
        start = tl.minimum(tl.load(starts_ptr + row), end)
        limit = start + query
        last_query = tl.minimum((tile * TILE_ROWS + TILE_ROWS - 1) // GROUP, count - 1)
        end = tl.minimum(end, tl.maximum(start + last_query + 1, 0))
    per_split = tl.cdiv(tl.cdiv(end, SPLITS), TILE_TOKENS) * TILE_TOKENS
    low = split * per_split
    high = tl.minimum(low + per_split, end)

    top = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    acc = tl.zeros([TILE_ROWS, D_PADDED], tl.float32)
    inside_head = head.to(tl.int64) * (BLOCK_TOKENS * D)
    for begin in range(low, high, TILE_TOKENS):
        token = begin + tl.arange(0, TILE_TOKENS)
        shown = token < high
        block = tl.load(tables_ptr + row.to(tl.int64) * table_stride + token // BLOCK_TOKENS, mask=shown, other=0)
        block = block.to(tl.int64)
        at = inside_head + (token % BLOCK_TOKENS) * D
        k = tl.load(
            k_ptr + (block * k_block_stride + at)[None, :] + dims[:, None],
            mask=shown[None, :] & real[:, None],
            other=0.0,
        )
        v = tl.load(
            v_ptr + (block * v_block_stride + at)[:, None] + dims[None, :],
            mask=shown[:, None] & real[None, :],
            other=0.0,
        )
        if UPCAST:
            scores = tl.dot(q.to(tl.float32), k.to(tl.float32), input_precision="ieee") * scale_log2
        else:
            scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale_log2
        if INT8:
            scores *= tl.load(k_scales_ptr + block * kv_heads + head, mask=shown, other=0.0)[None, :]
        visible = shown[None, :]
        if CAUSAL:
            visible = visible & (token[None, :] <= limit[:, None])
        scores = tl.where(visible, scores, float("-inf"))

        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        top = new_top
        if INT8:
            weights *= tl.load(v_scales_ptr + block * kv_heads + head, mask=shown, other=0.0)[None, :]
        if UPCAST:
            acc = tl.dot(weights, v.to(tl.float32), acc * shrink[:, None], input_precision="ieee")
        else:
            acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * shrink[:, None], input_precision="ieee")

    some = total > 0.0
    total = tl.where(some, total, 1.0)
    lse = tl.where(some, top * 0.6931471805599453 + tl.log(total), float("-inf"))
    # An argument that is 1 is a constant without methods, so the other factor is widened.
    to = flat + split.to(tl.int64) * tokens * (kv_heads * GROUP)
    tl.store(out_ptr + to[:, None] * D + dims[None, :], acc / total[:, None], mask=valid[:, None] & real[None, :])
    tl.store(lse_ptr + to, lse, mask=valid)


@triton.jit
def merge_splits(
    part_out_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,
    rows,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
):
    """Merge the splits of one (token, head); grid (rows,), rows = tokens * heads."""
    row = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, SPLITS_PADDED)
    dims = tl.arange(0, D_PADDED)
    real = splits < SPLITS
    source = splits.to(tl.int64) * rows + row
    lse = tl.load(part_lse_ptr + source, mask=real, other=float("-inf"))
    top = tl.max(lse, 0)
    weights = tl.exp(lse - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weights, 0)
    share = weights / tl.where(total > 0.0, total, 1.0)
    part = tl.load(
        part_out_ptr + source[:, None] * D + dims[None, :], mask=real[:, None] & (dims[None, :] < D), other=0.0
    )
    tl.store(out_ptr + row * D + dims, tl.sum(part * share[:, None], 0), mask=dims < D)
    tl.store(lse_ptr + row, tl.where(total > 0.0, top + tl.log(tl.where(total > 0.0, total, 1.0)), float("-inf")))
