"""The Triton device code that merges partials by log-sum-exp: pieces of a split row, or a step's from all workers."""

# Arguments of device code have no Python types.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def merge_partials(
    parts_ptr, tokens_ptr, entries_ptr, out_ptr, lse_ptr, heads, D: tl.constexpr, D_PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Merge the partials of one token and head in their order; grid (tokens, heads).

    tokens int32 [tokens, 2]: first entry of a token and how many it has; less than none leaves the token alone. entries
    int32 [n, 2]: where out [heads, D] and lse [heads] of a partial lie in parts, in units of ``heads`` float32.
    """
    token = tl.program_id(0)
    head = tl.program_id(1)
    first = tl.load(tokens_ptr + token * 2)
    count = tl.load(tokens_ptr + token * 2 + 1)
    if count < 0:
        return
    dims = tl.arange(0, D_PADDED)
    real = dims < D
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([D_PADDED], tl.float32)
    for begin in range(0, count, CHUNK):
        entry = begin + tl.arange(0, CHUNK)
        there = entry < count
        at = entries_ptr + (first + entry) * 2
        out_at = tl.load(at, mask=there, other=0).to(tl.int64) * heads + head * D
        lse_at = tl.load(at + 1, mask=there, other=0).to(tl.int64) * heads + head
        lse = tl.load(parts_ptr + lse_at, mask=there, other=float("-inf"))
        out = tl.load(parts_ptr + out_at[:, None] + dims[None, :], mask=there[:, None] & real[None, :], other=0.0)
        new_top = tl.maximum(top, tl.max(lse, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp(lse - base)
        shrink = tl.exp(top - base)
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink + tl.sum(out * weights[:, None], 0)
        top = new_top
    some = total > 0.0
    total = tl.where(some, total, 1.0)
    to = token.to(tl.int64) * heads + head
    tl.store(out_ptr + to * D + dims, acc / total, mask=real)
    tl.store(lse_ptr + to + tl.arange(0, 1), tl.where(some, top + tl.log(total), float("-inf")))
