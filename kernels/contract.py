"""The MicroAttention contract: the arguments of every implementation, and the checks that reject bad input."""

from __future__ import annotations

from typing import NamedTuple

import torch

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Call(NamedTuple):
    """One checked call of :func:`micro_attention`; see there for shapes and meaning."""

    q: torch.Tensor
    k_pool: torch.Tensor
    v_pool: torch.Tensor
    block_tables: torch.Tensor
    lengths: torch.Tensor
    scale: float
    query_offsets: torch.Tensor | None
    causal: bool
    q_start: torch.Tensor | None
    k_scales: torch.Tensor | None
    v_scales: torch.Tensor | None
    threads: int
    first_keys: torch.Tensor | None = None
    soft_cap: float | None = None

    @property
    def values_in_keys(self) -> bool:
        """Whether values are the first numbers of the keys, in the same memory."""
        k, v = self.k_pool, self.v_pool
        return k.data_ptr() == v.data_ptr() and k.stride() == v.stride()

    def empty_result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for out and lse."""
        tokens, heads, _ = self.q.shape
        out = self.q.new_empty((tokens, heads, self.v_pool.shape[3]), dtype=torch.float32)
        return out, self.q.new_empty((tokens, heads), dtype=torch.float32)


def check_call(call: Call) -> None:
    """Raise for tensors of the wrong type, shape, layout or device; reads no tensor values.

    Raises
    ------
    TypeError
        An argument is not a tensor, or has a dtype that the contract does not allow.
    ValueError
        A shape, memory layout or device does not fit; the message names the argument and what was expected.
    """
    _check_pools(call)
    _check_queries(call)
    rows = _check_index("block_tables", call.block_tables, call.q, dims=2)
    _check_index("lengths", call.lengths, call.q, size=rows)
    if call.query_offsets is not None:
        _check_index("query_offsets", call.query_offsets, call.q, size=rows + 1)
    elif call.q.shape[0] != rows:
        raise ValueError(
            f"q: expected one query per row of block_tables, [{rows}, heads, d], got {tuple(call.q.shape)}; "
            "pass query_offsets for rows with other query counts"
        )
    if call.causal:
        if call.q_start is None:
            raise ValueError(f"q_start: causal=True needs an int32 tensor of shape [{rows}]")
        _check_index("q_start", call.q_start, call.q, size=rows)
    elif call.q_start is not None:
        raise ValueError("q_start: only used with causal=True; leave it out for full attention")
    if call.first_keys is not None:
        _check_index("first_keys", call.first_keys, call.q, size=call.q.shape[0])
    if not isinstance(call.threads, int):
        raise TypeError(f"threads: expected an integer, got {type(call.threads).__name__}")
    if call.threads < 1:
        raise ValueError(f"threads: expected at least 1, got {call.threads}")
    _check_factor("scale", call.scale)
    if call.soft_cap is not None:
        _check_factor("soft_cap", call.soft_cap)


def check_values(call: Call) -> None:
    """Raise for lengths, offsets or block ids out of range (the native kernel does these checks itself).

    Raises
    ------
    ValueError
        With the argument's name and the allowed range.
    """
    block_tokens = call.k_pool.shape[2]
    max_blocks = call.block_tables.shape[1]
    lengths = call.lengths
    if lengths.numel() and (int(lengths.min()) < 0 or int(lengths.max()) > max_blocks * block_tokens):
        raise ValueError(lengths_message(max_blocks, block_tokens))
    offsets = call.query_offsets
    if offsets is not None and (
        int(offsets[0]) != 0 or int(offsets[-1]) != call.q.shape[0] or bool((offsets[1:] < offsets[:-1]).any())
    ):
        raise ValueError(offsets_message(call.q.shape[0]))
    used = torch.arange(max_blocks, device=lengths.device) * block_tokens < lengths[:, None]
    ids = call.block_tables[used]
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= call.k_pool.shape[0]):
        raise ValueError(tables_message(call.k_pool.shape[0]))


def lengths_message(max_blocks: int, block_tokens: int) -> str:
    """Text of the error for a length that its row of the block table cannot hold."""
    return (
        f"lengths: expected values from 0 to {max_blocks * block_tokens} "
        f"(block_tables has {max_blocks} blocks of {block_tokens} tokens per row)"
    )


def offsets_message(tokens: int) -> str:
    """Text of the error for query offsets that do not divide the queries into rows."""
    return f"query_offsets: expected non-decreasing values from 0 to {tokens}, the first dimension of q"


def tables_message(blocks: int) -> str:
    """Text of the error for a block id outside the pool."""
    return f"block_tables: expected block ids from 0 to {blocks - 1} wherever lengths reaches"


def slots_message() -> str:
    """Text of the error for new KV outside the pool."""
    return "layer, blocks, offsets: expected a layer and slots inside the pool"


def _check_factor(name: str, factor: float) -> None:
    if not isinstance(factor, int | float):
        raise TypeError(f"{name}: expected a number, got {type(factor).__name__}")
    if not 0 < factor < float("inf"):
        raise ValueError(f"{name}: expected a positive finite number, got {factor}")


def _check_pools(call: Call) -> None:
    k, v = call.k_pool, call.v_pool
    for name, pool in (("k_pool", k), ("v_pool", v)):
        if not isinstance(pool, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor [blocks, kv_heads, block_tokens, d], got {type(pool).__name__}")
        if pool.ndim != 4:
            raise ValueError(f"{name}: expected shape [blocks, kv_heads, block_tokens, d], got {tuple(pool.shape)}")
        _, heads, tokens, d = pool.shape
        if min(heads, tokens) < 1 or d < 8 or d % 8:
            raise ValueError(f"{name}: expected at least one head and token and d a multiple of 8, got {pool.shape}")
    if k.shape[:3] != v.shape[:3] or v.shape[3] > k.shape[3]:
        raise ValueError(
            f"v_pool: expected the shape of k_pool {tuple(k.shape)}, the last dimension may be shorter; "
            f"got {tuple(v.shape)}"
        )
    _check_strides("k_pool", k, k.shape[3])
    _check_strides("v_pool", v, k.shape[3] if call.values_in_keys else v.shape[3])
    if v.dtype != k.dtype:
        raise TypeError(f"v_pool: expected the dtype of k_pool {k.dtype}, got {v.dtype}")
    if v.device != k.device:
        raise ValueError(f"v_pool: expected the device of k_pool {k.device}, got {v.device}")
    if k.dtype == torch.int8:
        _check_scales("k_scales", call.k_scales, k)
        _check_scales("v_scales", call.v_scales, k)
    elif call.k_scales is not None or call.v_scales is not None:
        raise ValueError(f"k_scales, v_scales: only used with int8 pools, got {k.dtype}")


def _check_strides(name: str, pool: torch.Tensor, token: int) -> None:
    """Raise unless tokens of a block are ``token`` elements apart, and heads are contiguous."""
    if pool.stride()[1:] != (pool.shape[2] * token, token, 1) and pool.numel():
        raise ValueError(
            f"{name}: the inner three dimensions must be contiguous (values may also be the first numbers of the keys, "
            f"v_pool = k_pool[..., :n]), got strides {pool.stride()}"
        )


def _check_scales(name: str, scales: torch.Tensor | None, pool: torch.Tensor) -> None:
    expected = f"{name}: int8 pools need a contiguous float32 tensor {tuple(pool.shape[:2])} on {pool.device}"
    if not isinstance(scales, torch.Tensor) or scales.dtype != torch.float32:
        raise TypeError(expected)
    if scales.shape != pool.shape[:2] or not scales.is_contiguous() or scales.device != pool.device:
        raise ValueError(f"{expected}, got {tuple(scales.shape)} on {scales.device}")


def _check_queries(call: Call) -> None:
    q, pool = call.q, call.k_pool
    if not isinstance(q, torch.Tensor):
        raise TypeError(f"q: expected a tensor [tokens, heads, d], got {type(q).__name__}")
    kv_heads, d = pool.shape[1], pool.shape[3]
    if q.ndim != 3 or q.shape[2] != d or q.shape[1] < 1 or q.shape[1] % kv_heads:
        raise ValueError(f"q: expected shape [tokens, a multiple of {kv_heads} heads, {d}], got {tuple(q.shape)}")
    if q.dtype not in FLOAT_DTYPES:
        raise TypeError(f"q: expected bfloat16, float16 or float32, got {q.dtype}")
    if pool.dtype not in (q.dtype, torch.int8):
        raise TypeError(f"k_pool: expected the dtype of q {q.dtype} or int8, got {pool.dtype}")
    if q.device != pool.device:
        raise ValueError(f"q: expected the device of k_pool {pool.device}, got {q.device}")


def _check_index(name: str, index: torch.Tensor, q: torch.Tensor, *, dims: int = 1, size: int | None = None) -> int:
    if not isinstance(index, torch.Tensor) or index.dtype != torch.int32:
        got = index.dtype if isinstance(index, torch.Tensor) else type(index).__name__
        raise TypeError(f"{name}: expected an int32 tensor, got {got}")
    if index.ndim != dims or (size is not None and index.shape[0] != size):
        wanted = "[rows, max_blocks]" if dims == 2 else f"[{size}]"
        raise ValueError(f"{name}: expected shape {wanted}, got {tuple(index.shape)}")
    if index.stride(-1) != 1 and index.numel() > 1:
        raise ValueError(f"{name}: the last dimension must be contiguous, got strides {index.stride()}")
    if index.device != q.device:
        raise ValueError(f"{name}: expected the device of q {q.device}, got {index.device}")
    return index.shape[0]
