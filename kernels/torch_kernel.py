"""MicroAttention with PyTorch operations only: always available, on every device.

Rows are gathered and upcast to float32 in pieces that fit a cache, and passed to torch's CPU flash attention with
the query group folded into the query length (faster and more accurate than bf16 flash, see docs/kernels.md); other
devices, soft caps and values shorter than keys use two batched matrix products. Flash divides by zero if there are no
keys, which are never passed to it, and returns lse 0 instead of -inf if all keys are masked, which is corrected here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .contract import Call, check_values
from .merge import merge_tensors

PIECE_BYTES = 4 << 20
"""Bytes of the upcast keys of a piece."""


def run(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend row by row, piece by piece; see :func:`distkv_dask.kernels.micro_attention` for the contract."""
    check_values(call)
    tokens = call.q.shape[0]
    out, lse = call.empty_result()
    out.zero_()
    lse.fill_(-torch.inf)
    offsets = range(tokens + 1) if call.query_offsets is None else call.query_offsets.tolist()
    starts = [None] * len(call.lengths) if call.q_start is None else call.q_start.tolist()
    for row, length in enumerate(call.lengths.tolist()):
        first, last = offsets[row], offsets[row + 1]
        if first < last:
            window = None if call.first_keys is None else call.first_keys[first:last]
            sight = _sight(length, starts[row], last - first, window)
            _attend_row(call, row, sight, out[first:last], lse[first:last], call.q[first:last])
    return out, lse


class _Sight(NamedTuple):
    """Tokens [first, last) of a row that some query sees; query i sees those from first_keys[i] to start + i."""

    first: int
    last: int
    start: int | None
    first_keys: torch.Tensor | None

    def mask(self, first: int, last: int, count: int, device: torch.device) -> torch.Tensor | None:
        """Which of the tokens [first, last) each query sees, bool [count, last - first]; None: all."""
        tokens, mask = torch.arange(first, last, device=device), None
        if self.start is not None and self.start < last - 1:
            mask = tokens <= self.start + torch.arange(count, device=device)[:, None]
        if self.first_keys is not None:
            inside = tokens >= self.first_keys[:, None]
            mask = inside if mask is None else mask & inside
        return mask


def _sight(length: int, start: int | None, count: int, first_keys: torch.Tensor | None) -> _Sight:
    last = length if start is None else min(length, start + count)
    first = 0 if first_keys is None else max(int(first_keys.min()), 0)
    return _Sight(first, last, start, first_keys) if first < last else _Sight(0, 0, None, None)


def _attend_row(call: Call, row: int, sight: _Sight, out: torch.Tensor, lse: torch.Tensor, q: torch.Tensor) -> None:
    """Fill out [n, heads, d] and lse [n, heads] (given as 0 and -inf) for the n queries of one row."""
    count, heads, d = q.shape
    kv_heads, block_tokens = call.k_pool.shape[1:3]
    folded = q.float().view(count, kv_heads, heads // kv_heads, d).permute(1, 2, 0, 3).reshape(kv_heads, -1, d)
    begin = sight.first // block_tokens * block_tokens
    step = max(1, PIECE_BYTES // (4 * kv_heads * block_tokens * d)) * block_tokens
    most = min(step, -(-max(sight.last - begin, 0) // block_tokens) * block_tokens)
    keys, values = (torch.empty(kv_heads, most, pool.shape[3], device=q.device) for pool in (call.k_pool, call.v_pool))
    for first in range(begin, sight.last, step):
        last = min(first + step, sight.last)
        ids = call.block_tables[row, first // block_tokens : -(-last // block_tokens)].long()
        _upcast(call.k_pool, call.k_scales, ids, keys)
        _upcast(call.v_pool, call.v_scales, ids, values)
        seen = slice(max(0, sight.first - first), last - first)  # keys and values that no query sees may contain NaN
        mask = sight.mask(first + seen.start, last, count, q.device)
        if mask is not None:
            mask = mask.repeat(heads // kv_heads, 1)
        piece_out, piece_lse = _attend_piece(folded, keys[:, seen], values[:, seen], mask, call)
        merge_tensors(out, lse, _unfold(piece_out, count), _unfold(piece_lse[..., None], count)[..., 0])


def _upcast(pool: torch.Tensor, scales: torch.Tensor | None, ids: torch.Tensor, to: torch.Tensor) -> None:
    """Write blocks ``ids`` of a pool to the front of float32 [kv_heads, tokens, d]."""
    kv_heads, block_tokens, d = pool.shape[1:]
    blocks = to.view(kv_heads, -1, block_tokens, d)[:, : len(ids)]
    blocks.copy_(pool.index_select(0, ids).transpose(0, 1))
    if scales is not None:
        blocks *= scales.index_select(0, ids).T[:, :, None, None]


def _unfold(folded: torch.Tensor, count: int) -> torch.Tensor:
    """[kv_heads, group * count, x] back to [count, heads, x]."""
    kv_heads, rows, width = folded.shape
    return folded.view(kv_heads, rows // count, count, width).permute(2, 0, 1, 3).reshape(count, -1, width)


def _attend_piece(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, call: Call
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of float32 q [heads, n, d] over k, v [heads, t, d] with t > 0: out [heads, n, d], lse [heads, n]."""
    if q.device.type == "cpu" and call.soft_cap is None and k.shape == v.shape:
        bias = None if mask is None else torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[None], k[None], v[None], 0.0, False, attn_mask=bias, scale=call.scale
        )
        out, lse = out[0], lse[0]
    else:
        scores = torch.bmm(q, k.transpose(1, 2)) * call.scale
        if call.soft_cap is not None:
            scores = call.soft_cap * torch.tanh(scores / call.soft_cap)
        if mask is not None:
            scores.masked_fill_(~mask, -torch.inf)
        lse = torch.logsumexp(scores, -1)
        out = torch.bmm(torch.exp(scores - lse[..., None]), v)
    if mask is not None:
        blind = ~mask.any(-1)
        out = out.masked_fill(blind[:, None], 0.0)
        lse = lse.masked_fill(blind, -torch.inf)
    return out, lse
