"""The Triton device code of MicroAttention: attention over paged blocks by a work list, and append.

One kernel serves decode, prefill and shared prefixes. The queries of a row and the heads of a group are packed into
the rows of a tile (row = query * group + head of the group), so that grouped heads fill a tensor-core tile and keys are
read once for all of them. The host writes the work list (triton_plan.py) and launches (triton_batch.py). Partials are
merged in triton_merge.py.
"""

# Arguments of device code have no Python types.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction


@triton.jit
def _blocks_at(table, begin, high, BLOCK_TOKENS: tl.constexpr, TILE_TOKENS: tl.constexpr):
    """Block of a tile of tokens: one where a tile lies in one block, else that of each token."""
    if BLOCK_TOKENS < TILE_TOKENS:
        begin += tl.arange(0, TILE_TOKENS)
    return tl.load(table + begin // BLOCK_TOKENS, mask=begin < high, other=0)


@triton.jit
def _tile_at(pool, block, stride, begin, head, TOKEN, PADDED, BLOCK_TOKENS: tl.constexpr, TILE_TOKENS: tl.constexpr):
    """Addresses of a tile's keys or values, [TILE_TOKENS, PADDED]; those of two tokens lie TOKEN apart."""
    in_head = head.to(tl.int64) * (BLOCK_TOKENS * TOKEN)
    dims = tl.arange(0, PADDED)[None, :]
    inner = tl.arange(0, TILE_TOKENS)
    if BLOCK_TOKENS >= TILE_TOKENS:
        return pool + (block * stride + in_head + begin % BLOCK_TOKENS * TOKEN) + (inner[:, None] * TOKEN + dims)
    return pool + (block * stride + in_head + (begin + inner) % BLOCK_TOKENS * TOKEN)[:, None] + dims


@triton.jit
def _tanh(x):
    """Within two roundings, for tiny arguments too: a polynomial (Cephes), and from 0.625 on an exponential."""
    size = tl.abs(x)
    square = size * size
    inner = (-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2
    inner = (inner * square + 1.33314422036e-1) * square - 3.33332819422e-1
    fall = tl.exp2(size * -2.885390081777927)
    y = tl.where(size < 0.625, inner * square * size + size, (1.0 - fall) / (1.0 + fall))
    return tl.where(x < 0.0, -y, y)


@triton.jit
def _attend_tile(
    q,
    top,
    total,
    acc,
    first,
    limit,
    k_ptr,
    v_ptr,
    k_scales_ptr,
    v_scales_ptr,
    block,
    begin,
    low,
    high,
    head,
    scale,
    cap_log2,
    kv_heads,
    k_block_stride,
    v_block_stride,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    D_V: tl.constexpr,
    V_PADDED: tl.constexpr,
    V_TOKEN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    INT8: tl.constexpr,
    UPCAST: tl.constexpr,
    WINDOWED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Take one tile of tokens into the running maximum, total and weighted sum.

    MASKED: only tokens before ``high`` exist, and each row sees those up to its ``limit``. WINDOWED: each row also sees
    only tokens from its ``first`` on, which is never before ``low``.
    """
    block = block.to(tl.int64)
    token = begin + tl.arange(0, TILE_TOKENS)
    there = (tl.arange(0, D_PADDED) < D)[None, :]
    if MASKED:
        there = there & (token < high)[:, None]
        if WINDOWED:
            there = there & (token >= low)[:, None]
    at = _tile_at(k_ptr, block, k_block_stride, begin, head, D, D_PADDED, BLOCK_TOKENS, TILE_TOKENS)
    k = tl.load(at, mask=there, other=0.0)
    if UPCAST:
        scores = tl.dot(q.to(tl.float32), k.to(tl.float32).T, input_precision="ieee") * scale
    else:
        scores = tl.dot(q, k.to(q.dtype).T, input_precision="ieee") * scale
    if INT8:
        k_scale = tl.load(k_scales_ptr + block * kv_heads + head)
        scores *= k_scale if BLOCK_TOKENS >= TILE_TOKENS else k_scale[None, :]
    if cap_log2 is not None:
        scores = _tanh(scores) * cap_log2
    if MASKED:
        seen = (token[None, :] < high) & (token[None, :] <= limit[:, None])
        if WINDOWED:
            seen = seen & (token[None, :] >= first[:, None])
        scores = tl.where(seen, scores, float("-inf"))

    new_top = tl.maximum(top, tl.max(scores, 1))
    base = new_top
    if MASKED:
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, 1)
    there = (tl.arange(0, V_PADDED) < D_V)[None, :]
    if MASKED:
        there = there & (token < high)[:, None]
        if WINDOWED:
            there = there & (token >= low)[:, None]
    at = _tile_at(v_ptr, block, v_block_stride, begin, head, V_TOKEN, V_PADDED, BLOCK_TOKENS, TILE_TOKENS)
    v = tl.load(at, mask=there, other=0.0)
    if INT8:
        v_scale = tl.load(v_scales_ptr + block * kv_heads + head)
        weights *= v_scale if BLOCK_TOKENS >= TILE_TOKENS else v_scale[None, :]
    if UPCAST:
        acc = tl.dot(weights, v.to(tl.float32), acc * shrink[:, None], input_precision="ieee")
    else:
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * shrink[:, None], input_precision="ieee")
    return new_top, total, acc


@triton.jit(do_not_specialize=["table_stride"])
def attend(
    q_ptr,
    k_ptr,
    v_ptr,
    tables_ptr,
    work_ptr,
    first_keys_ptr,
    k_scales_ptr,
    v_scales_ptr,
    out_ptr,
    lse_ptr,
    part_out_ptr,
    part_lse_ptr,
    scale,
    cap_log2,
    kv_heads,
    table_stride,
    k_block_stride,
    v_block_stride,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    D_V: tl.constexpr,
    V_PADDED: tl.constexpr,
    V_TOKEN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    INT8: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One item of the work list (triton_plan.py) for one kv head; grid (items, kv_heads).

    out, part_out float32 [tokens, heads, D_V] and lse, part_lse float32 [tokens, heads]; first_keys int32 [tokens] or
    None: no windows. Scores are ``scale * product`` or, with a soft cap, ``cap_log2 * tanh(scale * product)``: scale or
    cap_log2 includes log2(e). UPCAST multiplies in float32: the interpreter's bfloat16 dot is broken.
    """
    WINDOWED: tl.constexpr = first_keys_ptr is not None
    work = work_ptr + tl.program_id(0) * 8
    head = tl.program_id(1)
    count = tl.load(work)
    if count == 0:
        return
    row = tl.load(work + 1)
    first = tl.load(work + 2)
    at = tl.load(work + 3)
    low = tl.load(work + 4)
    high = tl.load(work + 5)
    start = tl.load(work + 6)
    to = tl.load(work + 7)

    packed = at + tl.arange(0, TILE_ROWS)
    query = packed // GROUP
    limit = start + query
    dims = tl.arange(0, D_PADDED)
    valid = query < count
    shown = valid[:, None] & (dims < D)[None, :]
    in_token = head * GROUP + packed % GROUP
    # Triton makes an argument that is 1 a constant without methods, so the other factor is widened.
    flat = (first + query).to(tl.int64) * (kv_heads * GROUP) + in_token
    q = tl.load(q_ptr + flat[:, None] * D + dims[None, :], mask=shown, other=0.0)

    top = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    acc = tl.zeros([TILE_ROWS, V_PADDED], tl.float32)
    table = tables_ptr + row.to(tl.int64) * table_stride
    # Tiles [near, inner) and from `whole` on are masked, those between are not.
    near = low
    inner = low
    window = limit
    if WINDOWED:
        window = tl.load(first_keys_ptr + first + query, mask=valid, other=0)
        near = low // TILE_TOKENS * TILE_TOKENS
        inner = near
        if TILE_ROWS > 16:
            edge = tl.minimum(tl.max(window, 0), high)
            inner = tl.maximum(near, (edge + TILE_TOKENS - 1) // TILE_TOKENS * TILE_TOKENS)
    whole = inner
    if TILE_ROWS > 16:  # few rows are limited by memory: a mask costs less than the registers of a second loop
        whole += tl.maximum(tl.minimum(high, start + at // GROUP + 1) - inner, 0) // TILE_TOKENS * TILE_TOKENS
    # Blocks are looked up one tile ahead: the compiler then loads the next tiles while one is computed.
    block = _blocks_at(table, near, high, BLOCK_TOKENS, TILE_TOKENS)
    if WINDOWED:
        for begin in range(near, inner, TILE_TOKENS):
            here = block
            block = _blocks_at(table, begin + TILE_TOKENS, high, BLOCK_TOKENS, TILE_TOKENS)
            top, total, acc = _attend_tile(
                q, top, total, acc, window, limit, k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, here, begin, low, high,
                head, scale, cap_log2, kv_heads, k_block_stride, v_block_stride, D, D_PADDED, D_V, V_PADDED, V_TOKEN,
                BLOCK_TOKENS, TILE_TOKENS, INT8, UPCAST, True, True,
            )  # fmt: skip
    for begin in range(inner, whole, TILE_TOKENS):
        here = block
        block = _blocks_at(table, begin + TILE_TOKENS, high, BLOCK_TOKENS, TILE_TOKENS)
        top, total, acc = _attend_tile(
            q, top, total, acc, window, limit, k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, here, begin, low, high,
            head, scale, cap_log2, kv_heads, k_block_stride, v_block_stride, D, D_PADDED, D_V, V_PADDED, V_TOKEN,
            BLOCK_TOKENS, TILE_TOKENS, INT8, UPCAST, WINDOWED, False,
        )  # fmt: skip
    for begin in range(whole, high, TILE_TOKENS):
        here = block
        block = _blocks_at(table, begin + TILE_TOKENS, high, BLOCK_TOKENS, TILE_TOKENS)
        top, total, acc = _attend_tile(
            q, top, total, acc, window, limit, k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, here, begin, low, high,
            head, scale, cap_log2, kv_heads, k_block_stride, v_block_stride, D, D_PADDED, D_V, V_PADDED, V_TOKEN,
            BLOCK_TOKENS, TILE_TOKENS, INT8, UPCAST, WINDOWED, True,
        )  # fmt: skip

    some = total > 0.0
    total = tl.where(some, total, 1.0)
    lse = tl.where(some, top * 0.6931471805599453 + tl.log(total), float("-inf"))
    acc /= total[:, None]
    dims = tl.arange(0, V_PADDED)
    shown = valid[:, None] & (dims < D_V)[None, :]
    if to < 0:
        flat += (-1 - to - first).to(tl.int64) * (kv_heads * GROUP)
        tl.store(part_out_ptr + flat[:, None] * D_V + dims[None, :], acc, mask=shown)
        tl.store(part_lse_ptr + flat, lse, mask=valid)
    else:
        tl.store(out_ptr + flat[:, None] * D_V + dims[None, :], acc, mask=shown)
        tl.store(lse_ptr + flat, lse, mask=valid)


@triton.jit
def append(
    k_ptr, v_ptr, k_pool_ptr, v_pool_ptr, slots_ptr, kv_heads, k_block_stride, v_block_stride,
    D: tl.constexpr, D_PADDED: tl.constexpr, D_V: tl.constexpr, V_PADDED: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """Store new KV of one token and kv head; grid (tokens, kv_heads).

    k [tokens, kv_heads, D], v [tokens, kv_heads, D_V], None: values are a part of the keys; slots int32 [tokens, 2]:
    block and offset in it, a negative block stores nothing.
    """
    token = tl.program_id(0)
    head = tl.program_id(1)
    block = tl.load(slots_ptr + token * 2).to(tl.int64)
    offset = tl.load(slots_ptr + token * 2 + 1)
    if block < 0:
        return
    source = token.to(tl.int64) * kv_heads + head
    to = head * BLOCK_TOKENS + offset
    dims = tl.arange(0, D_PADDED)
    fresh = tl.load(k_ptr + source * D + dims, mask=dims < D)
    tl.store(k_pool_ptr + block * k_block_stride + to * D + dims, fresh, mask=dims < D)
    if v_ptr is not None:
        dims = tl.arange(0, V_PADDED)
        fresh = tl.load(v_ptr + source * D_V + dims, mask=dims < D_V)
        tl.store(v_pool_ptr + block * v_block_stride + to * D_V + dims, fresh, mask=dims < D_V)


INTERPRETED = isinstance(attend, InterpretedFunction)
"""Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1)."""
