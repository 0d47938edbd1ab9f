"""MicroAttention for few queries in numba: every key and value is read from memory once, in place.

The arithmetic runs on tiles of four query rows (queries times group, padded with zeros): scores are stored as
[token][4], so that softmax treats 16 lanes alike. As in the C++ core, blocks are the outer loop and heads the inner
one, and the next chunk is prefetched while one is computed. ``like`` stands for the pool's dtype, see numba_simd.py;
all other arguments are int64 (addresses, counts, indices of elements) unless they say otherwise.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"

from __future__ import annotations

import math

import numpy as np
from numba import njit

from .numba_simd import (
    exp2,
    fetch_and_increment,
    fma,
    integer,
    load,
    load_half,
    maximum,
    number,
    prefetch,
    put,
    splat,
    store,
    store_sums,
    tanh,
    turn,
)

CHUNK = 64
LOG2_E = np.float32(math.log2(math.e))
LN_2 = np.float32(math.log(2))
ZERO, ONE = np.float32(0), np.float32(1)
NOTHING, LOWEST = np.float32(-np.inf), np.float32(-3e38)


@njit(nogil=True)
def scores(like, k, d, ask, n, q, width, s, ahead):
    """Scores of n keys and four query rows; prefetches ``ask`` bytes per token at ``ahead``."""
    for j in range(0, n, 2):
        at, other = j * d, min(j + 1, n - 1) * d
        for line in range(j * ask, min(j + 2, n) * ask, 64):
            prefetch(ahead + line)
        a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = splat(ZERO)
        for c in range(0, d, 16):
            if d - c >= 16:
                x, y = load(like, k, at + c), load(like, k, other + c)
            else:
                x, y = load_half(like, k, at + c), load_half(like, k, other + c)
            q0, q1 = load(ZERO, q, c), load(ZERO, q, width + c)
            q2, q3 = load(ZERO, q, 2 * width + c), load(ZERO, q, 3 * width + c)
            a0, a1, a2, a3 = fma(x, q0, a0), fma(x, q1, a1), fma(x, q2, a2), fma(x, q3, a3)
            b0, b1, b2, b3 = fma(y, q0, b0), fma(y, q1, b1), fma(y, q2, b2), fma(y, q3, b3)
        store_sums(s, 4 * j, a0, a1, a2, a3)
        store_sums(s, 4 * j + 4, b0, b1, b2, b3)


@njit(nogil=True)
def soften(s, n, score_scale, value_scale, state, shrink):
    """Running softmax of four rows: weights replace the scores of n tokens; state is [top[16], sum[16]]."""
    end = (4 * n + 15) // 16 * 16
    for i in range(4 * n, end):
        put(s, i, NOTHING)
    high = splat(NOTHING)
    for i in range(0, end, 16):
        high = maximum(load(ZERO, s, i), high)
    high = maximum(high, turn(high))
    high = maximum(high, turn(turn(high)))
    none, one, scale = splat(ZERO), splat(ONE), splat(score_scale)
    old = load(ZERO, state, 0)
    top = maximum(old, fma(high, scale, none))
    base = fma(maximum(top, splat(LOWEST)), splat(-ONE), none)
    less = exp2(fma(old, one, base))
    total = fma(load(ZERO, state, 16), less, none)
    for i in range(0, end, 16):
        x = exp2(fma(load(ZERO, s, i), scale, base))
        total = fma(x, one, total)
        store(s, i, fma(x, splat(value_scale), none))
    store(state, 0, top)
    store(state, 16, total)
    store(shrink, 0, less)


@njit(nogil=True)
def cap(s, n, inner):
    """The soft cap of four rows' scores, without its outer factor."""
    none, factor = splat(ZERO), splat(inner)
    for i in range(0, (4 * n + 15) // 16 * 16, 16):
        store(s, i, tanh(fma(load(ZERO, s, i), factor, none)))


@njit(nogil=True)
def weigh(like, v, d, step, ask, n, w, acc, width, shrink, ahead):
    """Shrink the accumulators of four rows, and add n weighted values ``step`` apart; prefetch as in :func:`scores`."""
    none = splat(ZERO)
    s0, s1, s2, s3 = (splat(number(shrink, 0)), splat(number(shrink, 1)), splat(number(shrink, 2)),
                      splat(number(shrink, 3)))  # fmt: skip
    for c in range(0, d - 31, 32):
        a0, b0 = fma(load(ZERO, acc, c), s0, none), fma(load(ZERO, acc, c + 16), s0, none)
        at = c + width
        a1, b1 = fma(load(ZERO, acc, at), s1, none), fma(load(ZERO, acc, at + 16), s1, none)
        at += width
        a2, b2 = fma(load(ZERO, acc, at), s2, none), fma(load(ZERO, acc, at + 16), s2, none)
        at += width
        a3, b3 = fma(load(ZERO, acc, at), s3, none), fma(load(ZERO, acc, at + 16), s3, none)
        for j in range(n):
            for line in range(j * ask, (j + 1) * ask, 64):
                prefetch(ahead + line)
            x, y = load(like, v, j * step + c), load(like, v, j * step + c + 16)
            w0, w1 = splat(number(w, 4 * j)), splat(number(w, 4 * j + 1))
            w2, w3 = splat(number(w, 4 * j + 2)), splat(number(w, 4 * j + 3))
            a0, a1, a2, a3 = fma(w0, x, a0), fma(w1, x, a1), fma(w2, x, a2), fma(w3, x, a3)
            b0, b1, b2, b3 = fma(w0, y, b0), fma(w1, y, b1), fma(w2, y, b2), fma(w3, y, b3)
        ask = 0
        for r, a, b in ((0, a0, b0), (1, a1, b1), (2, a2, b2), (3, a3, b3)):
            store(acc, r * width + c, a)
            store(acc, r * width + c + 16, b)
    for c in range(d // 32 * 32, d, 16):
        a0, a1 = fma(load(ZERO, acc, c), s0, none), fma(load(ZERO, acc, width + c), s1, none)
        a2, a3 = fma(load(ZERO, acc, 2 * width + c), s2, none), fma(load(ZERO, acc, 3 * width + c), s3, none)
        for j in range(n):
            for line in range(j * ask, (j + 1) * ask, 64):
                prefetch(ahead + line)
            x = load(like, v, j * step + c) if d - c >= 16 else load_half(like, v, j * step + c)
            a0, a1 = fma(splat(number(w, 4 * j)), x, a0), fma(splat(number(w, 4 * j + 1)), x, a1)
            a2, a3 = fma(splat(number(w, 4 * j + 2)), x, a2), fma(splat(number(w, 4 * j + 3)), x, a3)
        ask = 0
        for r, a in ((0, a0), (1, a1), (2, a2), (3, a3)):
            store(acc, r * width + c, a)


@njit(nogil=True)
def hide(s, token, n, first, last, group, limit, first_keys):
    """Scores of n tokens from ``token`` on that query rows [first, last), at most four, may not see.

    Query 0 sees tokens up to ``limit``, and from the first of ``first_keys`` on, if that is not 0.
    """
    for r in range(first, last):
        for j in range(max(0, limit + r // group + 1 - token), n):
            put(s, 4 * j + r - first, NOTHING)
        if first_keys != 0:
            for j in range(min(n, integer(first_keys, r // group) - token)):
                put(s, 4 * j + r - first, NOTHING)


@njit(nogil=True)
def attend_item(like, args, scale, soft_cap, item, partials, scratch):
    """Attention of one row's queries over tokens [first, last) of it; its first query sees tokens up to limit."""
    (q, k, v, tables, _, _, _, first_keys, k_scales, v_scales, out, lse, _, _, heads, kv_heads, d, block_tokens, _, _,
     table_stride, k_block, v_block, d_v, v_token, size) = args  # fmt: skip
    row, query, queries, first, last, limit, slot = item
    group, width, v_width = heads // kv_heads, (d + 15) // 16 * 16, (d_v + 15) // 16 * 16
    rows = queries * group
    tiles = (rows + 3) // 4
    tile_rows = kv_heads * tiles * 4
    packed, acc = scratch, scratch + 4 * tile_rows * width
    states = acc + 4 * tile_rows * v_width
    shrink = states + 4 * 32 * kv_heads * tiles
    s = shrink + 64
    if first_keys != 0:
        first_keys += 4 * query
    for i in range(tile_rows * (width + v_width)):
        put(scratch, i, ZERO)
    for i in range(kv_heads * tiles * 32):
        put(states, i, NOTHING if i % 32 < 16 else ZERO)
    for h in range(kv_heads):
        for r in range(rows):
            source = ((query + r // group) * heads + h * group + r % group) * d
            for c in range(d):
                put(packed, (h * tiles * 4 + r) * width + c, number(q, source + c))

    table = tables + 4 * row * table_stride
    token = first
    while token < last:
        block, inside = integer(table, token // block_tokens), token % block_tokens
        n = min(CHUNK, block_tokens - inside, last - token)
        for h in range(kv_heads):
            at = h * block_tokens + inside
            keys, values = k + size * (block * k_block + at * d), v + size * (block * v_block + at * v_token)
            next_block, next_at, ask = block, at + block_tokens, d * size
            if h + 1 == kv_heads:
                after = token + n
                next_block = integer(table, after // block_tokens) if after < last else block
                next_at = after % block_tokens
            ahead_k = k + size * (next_block * k_block + next_at * d)
            ahead_v = v + size * (next_block * v_block + next_at * v_token)
            ask_v = 0 if keys == values else d_v * size
            score_scale, value_scale = np.float32(scale) * LOG2_E, ONE
            if soft_cap > 0:
                score_scale = np.float32(scale / soft_cap)
            if k_scales != 0:
                score_scale *= number(k_scales, block * kv_heads + h)
                value_scale = number(v_scales, block * kv_heads + h)
            for tile in range(tiles):
                at = 16 * (h * tiles + tile)
                state = states + 128 * (h * tiles + tile)
                scores(like, keys, d, ask, n, packed + at * width, width, s, ahead_k)
                if soft_cap > 0:
                    cap(s, n, score_scale)
                if first_keys != 0 or limit < token + n - 1:
                    hide(s, token, n, 4 * tile, min(4 * tile + 4, rows), group, limit, first_keys)
                outer = np.float32(soft_cap) * LOG2_E if soft_cap > 0 else score_scale
                soften(s, n, outer, value_scale, state, shrink)
                weigh(like, values, d_v, v_token, ask_v, n, s, acc + at * v_width, v_width, shrink, ahead_v)
                ask = ask_v = 0
        token += n

    if slot >= 0:
        out, lse = partials + 4 * slot, partials + 4 * (slot + queries * heads * d_v)
    else:
        out, lse = out + 4 * query * heads * d_v, lse + 4 * query * heads
    for h in range(kv_heads):
        for r in range(rows):
            conclude(acc + 4 * (h * tiles * 4 + r) * v_width, states + 128 * (h * tiles + r // 4), r % 4, d_v,
                     out, lse, r // group * heads + h * group + r % group)  # fmt: skip


@njit(nogil=True)
def conclude(acc, state, lane, d, out, lse, to):
    """One query row's answer; its sum lies in every fourth lane."""
    top = number(state, lane)
    total = ZERO
    for i in range(4):
        total += number(state, 16 + lane + 4 * i)
    blind = top == NOTHING
    inverse = ZERO if blind else ONE / total
    for c in range(d):
        put(out, to * d + c, number(acc, c) * inverse)
    put(lse, to, NOTHING if blind else top * LN_2 + np.float32(math.log(total)))


def attend_items(like, args, scale, soft_cap, items, count, partials, counter):
    """Take items until there are none left; any number of threads may do so with the same ``counter`` (an address)."""
    heads, kv_heads, d = args[14], args[15], args[16]
    most = 0
    for i in range(count):
        most = max(most, items[i, 2])
    rows = kv_heads * ((most * (heads // kv_heads) + 3) // 4 * 4)
    scratch = np.empty(rows * (2 * d + 32) + rows * 8 + 4 * CHUNK + 64, np.float32)
    at = fetch_and_increment(counter)
    while at < count:
        item = (items[at, 0], items[at, 1], items[at, 2], items[at, 3], items[at, 4], items[at, 5], items[at, 6])
        attend_item(like, args, scale, soft_cap, item, partials, scratch.ctypes.data)
        at = fetch_and_increment(counter)
