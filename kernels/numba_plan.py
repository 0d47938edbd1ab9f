"""How a call is cut into items for the attention of numba_jit.py, and the merge of what was cut.

As there, arguments are int64 (addresses, counts, indices of elements) unless they say otherwise.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"

from __future__ import annotations

import math

import numpy as np
from numba import njit

from .numba_kernel import MOST_PIECES, PIECE_TOKENS
from .numba_simd import integer, number, put

NOTHING = np.float32(-np.inf)
OK, BAD_LENGTHS, BAD_OFFSETS, BAD_TABLES = range(4)
NO_LIMIT = 1 << 60


@njit(nogil=True)
def check_row(args, row, first):
    """(status, last query, length, last token that the row's first query sees)."""
    (_, _, _, tables, lengths, offsets, starts, _, _, _, _, _, _, tokens, _, _, _, block_tokens, blocks, max_blocks,
     table_stride, _, _, _, _, _) = args  # fmt: skip
    length = integer(lengths, row)
    last = integer(offsets, row + 1) if offsets != 0 else row + 1
    limit = integer(starts, row) if starts != 0 else NO_LIMIT
    if length < 0 or length > max_blocks * block_tokens:
        return BAD_LENGTHS, last, length, limit
    if last < first or last > tokens:
        return BAD_OFFSETS, last, length, limit
    for b in range((length + block_tokens - 1) // block_tokens):
        block = integer(tables, row * table_stride + b)
        if block < 0 or block >= blocks:
            return BAD_TABLES, last, length, limit
    return OK, last, length, limit


@njit(nogil=True)
def seen_by(args, query, queries, length, sees):
    """Tokens [first, last) of a row that some of its queries see; the first query sees tokens up to ``sees``."""
    first_keys = args[7]
    if first_keys == 0:
        return 0, max(0, min(length, sees + queries))
    low, high = length, 0
    for i in range(queries):
        first, last = max(0, integer(first_keys, query + i)), min(length, sees + i + 1)
        if first < last:
            low, high = min(low, first), last
    return (low, high) if low < high else (0, 0)


def plan(args, tile, items):
    """Check all values, and cut rows into items: by ``tile`` queries, or rows with fewer by tokens.

    How a row is cut depends on this row alone: threads and other rows must not change how its sums are rounded.

    items int64 [n, 7]: row, first query, queries, first and last token, last token that the first query sees, and place
    among partial results (-1: the answer). Returns (status, items, floats of partial results).
    """
    offsets, rows, tokens, heads, block_tokens, d_v = args[5], args[12], args[13], args[14], args[17], args[23]
    if offsets != 0 and (integer(offsets, 0) != 0 or integer(offsets, rows) != tokens):
        return BAD_OFFSETS, 0, 0
    count, floats, first = 0, 0, 0
    for row in range(rows):
        status, last, length, limit = check_row(args, row, first)
        if status != OK:
            return status, 0, 0
        for query in range(first, last, tile):
            queries, sees = min(tile, last - query), limit + query - first
            low, seen = seen_by(args, query, queries, length, sees)
            start = low // block_tokens * block_tokens
            piece = max(1, seen - start)
            if last - first <= tile:
                piece = PIECE_TOKENS
                while piece * MOST_PIECES < seen - start:
                    piece *= 2
            piece = (piece + block_tokens - 1) // block_tokens * block_tokens
            for begin in range(start, max(seen, 1), piece):
                slot = floats if begin > start else -1
                items[count] = (row, query, queries, max(low, begin), min(seen, begin + piece), sees, slot)
                count += 1
                floats += queries * heads * (d_v + 1) if begin > start else 0
        first = last
    return OK, count, floats


def merge_parts(args, items, count, partials):
    """Merge the items that have a place among partial results into the answer."""
    out, lse, heads, d = args[10], args[11], args[14], args[23]
    for i in range(count):
        query, queries, slot = items[i, 1], items[i, 2], items[i, 6]
        for at in range(queries * heads if slot >= 0 else 0):
            to = query * heads + at
            mine, part = number(lse, to), number(partials, slot + queries * heads * d + at)
            top = max(mine, part)
            if part == NOTHING:
                continue
            total = math.exp(mine - top) + math.exp(part - top)
            put(lse, to, np.float32(top + math.log(total)))
            share = np.float32(math.exp(part - top) / total)
            for c in range(d):
                before = number(out, to * d + c)
                put(out, to * d + c, before + share * (number(partials, slot + at * d + c) - before))
