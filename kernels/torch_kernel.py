"""MicroAttention with PyTorch operations only: always there, on every device.

Rows are gathered and upcast to float32 in pieces that stay in a cache, and handed to torch's CPU flash attention with
the query group folded into the query length (faster and more accurate than bf16 flash, see docs/kernels.md); other
devices use two batched matrix products. Flash divides by zero on no keys and returns lse 0 instead of -inf when every
key is masked: neither reaches it or leaves here.
"""

from __future__ import annotations

import torch

from .contract import Call, check_values
from .merge import merge_tensors

PIECE_BYTES = 4 << 20
"""Keys, upcast, that a piece holds."""


def run(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend row by row, piece by piece; see :func:`distkv_dask.kernels.micro_attention` for the contract."""
    check_values(call)
    tokens, heads, d = call.q.shape
    out = torch.zeros(tokens, heads, d, dtype=torch.float32, device=call.q.device)
    lse = torch.full((tokens, heads), -torch.inf, dtype=torch.float32, device=call.q.device)
    offsets = range(tokens + 1) if call.query_offsets is None else call.query_offsets.tolist()
    starts = [None] * len(call.lengths) if call.q_start is None else call.q_start.tolist()
    for row, length in enumerate(call.lengths.tolist()):
        first, last = offsets[row], offsets[row + 1]
        if first < last:
            _attend_row(call, row, length, starts[row], out[first:last], lse[first:last], call.q[first:last])
    return out, lse


def _attend_row(
    call: Call,
    row: int,
    length: int,
    start: int | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
) -> None:
    """Fill out [n, heads, d] and lse [n, heads] (given as 0 and -inf) for the n queries of one row."""
    count, heads, d = q.shape
    kv_heads, block_tokens = call.k_pool.shape[1:3]
    folded = q.float().view(count, kv_heads, heads // kv_heads, d).permute(1, 2, 0, 3).reshape(kv_heads, -1, d)
    if start is not None:
        length = min(length, start + count)
    step = max(1, PIECE_BYTES // (4 * kv_heads * block_tokens * d)) * block_tokens
    most = min(step, -(-max(length, 0) // block_tokens) * block_tokens)
    keys, values = torch.empty(2, kv_heads, most, d, device=q.device)
    for first in range(0, length, step):
        last = min(first + step, length)
        ids = call.block_tables[row, first // block_tokens : -(-last // block_tokens)].long()
        _upcast(call.k_pool, call.k_scales, ids, keys)
        _upcast(call.v_pool, call.v_scales, ids, values)
        mask = None
        if start is not None and start < last - 1:
            mask = _mask(start, count, first, last, q.device).repeat(heads // kv_heads, 1)
        piece = keys[:, : last - first], values[:, : last - first]
        piece_out, piece_lse = _attend_piece(folded, *piece, mask, call.scale)
        merge_tensors(out, lse, _unfold(piece_out, count), _unfold(piece_lse[..., None], count)[..., 0])


def _upcast(pool: torch.Tensor, scales: torch.Tensor | None, ids: torch.Tensor, to: torch.Tensor) -> None:
    """Write blocks ``ids`` of a pool to the front of float32 [kv_heads, tokens, d]."""
    kv_heads, block_tokens, d = pool.shape[1:]
    blocks = to.view(kv_heads, -1, block_tokens, d)[:, : len(ids)]
    blocks.copy_(pool.index_select(0, ids).transpose(0, 1))
    if scales is not None:
        blocks *= scales.index_select(0, ids).T[:, :, None, None]


def _mask(start: int, count: int, first: int, last: int, device: torch.device) -> torch.Tensor:
    """Visible keys of each query, bool [count, last - first]."""
    limit = start + torch.arange(count, device=device)
    return torch.arange(first, last, device=device) <= limit[:, None]


def _unfold(folded: torch.Tensor, count: int) -> torch.Tensor:
    """[kv_heads, group * count, x] back to [count, heads, x]."""
    kv_heads, rows, width = folded.shape
    return folded.view(kv_heads, rows // count, count, width).permute(2, 0, 1, 3).reshape(count, -1, width)


def _attend_piece(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of float32 q [heads, n, d] over k, v [heads, t, d] with t > 0: out [heads, n, d], lse [heads, n]."""
    if q.device.type == "cpu":
        bias = None if mask is None else torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[None], k[None], v[None], 0.0, False, attn_mask=bias, scale=scale
        )
        out, lse = out[0], lse[0]
    else:
        scores = torch.bmm(q, k.transpose(1, 2)) * scale
        if mask is not None:
            scores.masked_fill_(~mask, -torch.inf)
        lse = torch.logsumexp(scores, -1)
        out = torch.bmm(torch.exp(scores - lse[..., None]), v)
    if mask is not None:
        blind = ~mask.any(-1)
        out = out.masked_fill(blind[:, None], 0.0)
        lse = lse.masked_fill(blind, -torch.inf)
    return out, lse
