"""Which MicroAttention implementation serves a device, dtype and shape, and why."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch

from . import native_kernel, numba_kernel, reference, torch_kernel, triton_batch, triton_kernel
from .contract import Call, check_call

Run = Callable[[Call], tuple[torch.Tensor, torch.Tensor]]


class Choice(NamedTuple):
    """Name of the implementation that serves a case, and the reason in words."""

    name: str
    reason: str


def _implementations() -> dict[str, Run]:
    runs: dict[str, Run] = {"reference": reference.run, "torch": torch_kernel.run, "triton": triton_kernel.run}
    if numba_kernel.installed():
        runs["numba"] = numba_kernel.run
    if native_kernel.missing() is None:
        runs["native"] = native_kernel.run
        for isa in (*native_kernel.instruction_sets(), *native_kernel.software_models()):
            runs[f"native:{isa}"] = partial(native_kernel.run_isa, isa=isa.encode())
    return runs


IMPLEMENTATIONS = _implementations()


@lru_cache(maxsize=256)
def choose(
    device_type: str, kv_dtype: torch.dtype, head_dim: int, block_tokens: int, override: str | None = None
) -> Choice:
    """Choose the implementation for a case.

    Parameters
    ----------
    device_type
        ``"cpu"`` or ``"cuda"``: where the pool lives.
    kv_dtype, head_dim, block_tokens
        Dtype, head dim and block size of the pool.
    override
        Name of the implementation to use instead of the best one.

    Raises
    ------
    ValueError
        ``override`` is unknown.
    """
    if override is not None:
        if override not in IMPLEMENTATIONS:
            raise ValueError(f"implementation: expected one of {sorted(IMPLEMENTATIONS)}, got {override!r}")
        if override.startswith(("native", "numba")) and device_type != "cpu":
            raise ValueError(f"implementation: {override!r} serves CPU pools, not {device_type}")
        return Choice(override, "chosen by the caller")
    if device_type == "cpu":
        missing = native_kernel.missing()
        if missing is None:
            return Choice("native", "the C++ core was built")
        without = numba_kernel.missing()
        if without is None:
            return Choice("numba", missing)
        return Choice("torch", f"{missing}; {without}")
    unsupported = triton_kernel.unsupported(device_type, block_tokens, head_dim)
    if unsupported is None:
        return Choice("triton", f"GPU pool with blocks of {block_tokens} tokens")
    return Choice("torch", unsupported)


def make_ready(
    k_pool: torch.Tensor, v_pool: torch.Tensor, heads: int, *, windows: bool = False, soft_cap: float | None = None
) -> Choice:
    """Choose for a pool, and compile now what would otherwise delay its first request by seconds.

    Parameters
    ----------
    k_pool, v_pool
        [blocks, kv_heads, block_tokens, d] and, for values, at most d.
    heads
        Query heads of the model.
    windows, soft_cap
        Whether calls have ``first_keys``, and their soft cap; call this once for each kind of layers of a model.
    """
    choice = choose(k_pool.device.type, k_pool.dtype, k_pool.shape[3], k_pool.shape[2])
    if choice.name == "numba":
        numba_kernel.compiled(k_pool.dtype)
    if choice.name == "triton":
        triton_batch.warm_up(k_pool, v_pool, heads, windows=windows, soft_cap=soft_cap)
    return choice


def micro_attention(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    block_tables: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    query_offsets: torch.Tensor | None = None,
    causal: bool = False,
    q_start: torch.Tensor | None = None,
    k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None,
    threads: int | None = None,
    implementation: str | None = None,
    first_keys: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a ragged batch of queries over one shard of paged KV: the paper's MicroAttention.

    Parameters
    ----------
    q
        Queries of all rows, concatenated, [tokens, heads, d], bfloat16, float16 or float32.
    k_pool, v_pool
        [blocks, kv_heads, block_tokens, d], the dtype of ``q`` or int8; any stride between blocks, contiguous inside
        a block. ``heads`` is a multiple of ``kv_heads``, ``d`` a multiple of 8. Values may be shorter than keys
        (``dv`` numbers, a multiple of 8), also as the first numbers of the keys: ``k_pool[..., :dv]``.
    block_tables
        int32 [rows, max_blocks]: the blocks of each row in order. Entries past ``lengths`` are never read.
    lengths
        int32 [rows]: visible tokens of each row; 0 is allowed.
    scale
        Factor of the scores, usually ``d ** -0.5``.
    query_offsets
        int32 [rows + 1]: row r has the queries ``query_offsets[r]`` to ``query_offsets[r + 1]``. None: one per row.
        Sequences that share a prefix can be one row over the prefix with all their queries, so that it is read once.
    causal, q_start
        With ``causal``, query i of row r sees shard positions up to ``q_start[r] + i`` (int32 [rows]); a value at or
        past the end sees everything, a negative sum sees nothing.
    k_scales, v_scales
        float32 [blocks, kv_heads], for int8 pools: a block's values are ``int8 * scale``.
    threads
        Maximum CPU threads; None: ``torch.get_num_threads()`` of the calling thread.
    implementation
        Name from :data:`IMPLEMENTATIONS` instead of the one that :func:`choose` picks.
    first_keys
        int32 [tokens]: each query sees only its row's shard positions from here on (a sliding or chunked window). A
        value at or below 0 hides nothing, one at or past the end everything. Blocks that no query sees are not read.
    soft_cap
        Scores become ``soft_cap * tanh(score / soft_cap)``; None: they stay as they are.

    Returns
    -------
    tuple
        (out float32 [tokens, heads, dv], lse float32 [tokens, heads], natural logarithm). A query that sees no key
        gets (0, -inf).

    Raises
    ------
    TypeError, ValueError
        Bad input; the message names the argument and what was expected.
    """
    call = Call(
        q, k_pool, v_pool, block_tables, lengths, scale, query_offsets, causal, q_start, k_scales, v_scales,
        torch.get_num_threads() if threads is None else threads, first_keys, soft_cap,
    )  # fmt: skip
    check_call(call)
    choice = choose(k_pool.device.type, k_pool.dtype, k_pool.shape[3], k_pool.shape[2], implementation)
    return IMPLEMENTATIONS[choice.name](call)
