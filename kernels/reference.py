"""MicroAttention in float64, written for clarity: the implementation that all others are tested against."""

from __future__ import annotations

import torch

from .contract import Call, check_values


def run(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend row by row in float64; see :func:`distkv_dask.kernels.micro_attention` for the contract."""
    check_values(call)
    tokens, heads, _ = call.q.shape
    out = torch.zeros(tokens, heads, call.v_pool.shape[3], dtype=torch.float64, device=call.q.device)
    lse = torch.full((tokens, heads), -torch.inf, dtype=torch.float64, device=call.q.device)
    group = heads // call.k_pool.shape[1]
    offsets = range(tokens + 1) if call.query_offsets is None else call.query_offsets.tolist()
    for row, length in enumerate(call.lengths.tolist()):
        queries = slice(offsets[row], offsets[row + 1])
        count = offsets[row + 1] - offsets[row]
        keys, values = (_gather(call, which, row, length).repeat_interleave(group, 0) for which in ("k", "v"))
        scores = torch.einsum("nhd,htd->hnt", call.q[queries].double(), keys) * call.scale
        if call.soft_cap is not None:
            scores = call.soft_cap * torch.tanh(scores / call.soft_cap)
        positions = torch.arange(length, device=call.q.device)
        if call.q_start is not None:
            last = int(call.q_start[row]) + torch.arange(count, device=call.q.device)
            scores.masked_fill_(positions > last[:, None], -torch.inf)
        if call.first_keys is not None:
            scores.masked_fill_(positions < call.first_keys[queries, None], -torch.inf)
        seen = (scores != -torch.inf).flatten(0, 1).any(0)  # keys and values that no query sees may contain NaN
        scores, values = scores[..., seen], values[:, seen]
        total = torch.logsumexp(scores, -1)
        weights = torch.exp(scores - total[..., None]).nan_to_num(0.0)
        out[queries] = torch.einsum("hnt,htd->nhd", weights, values)
        lse[queries] = total.T
    return out.float(), lse.float()


def _gather(call: Call, which: str, row: int, length: int) -> torch.Tensor:
    """Keys or values of one row as float64 [kv_heads, length, d]."""
    pool, scales = (call.k_pool, call.k_scales) if which == "k" else (call.v_pool, call.v_scales)
    block_tokens = pool.shape[2]
    ids = call.block_tables[row, : -(-length // block_tokens)].long()
    blocks = pool[ids].double()
    if scales is not None:
        blocks *= scales[ids].double()[:, :, None, None]
    return blocks.transpose(0, 1).flatten(1, 2)[:, :length]
