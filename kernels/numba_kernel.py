"""MicroAttention in numba: the fast path on CPUs for which no C++ core was built.

Plans and merges in the compiled code of numba_plan.py, and takes its share of the work in that of numba_jit.py.
It uses its own threads: numba's thread pools end the process when two threads call at once, or after a fork.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from .contract import Call, lengths_message, offsets_message, tables_message

TILE_ROWS = 128
"""Query rows (queries times group) that read KV together."""

# The type of a value stands for a pool's dtype in compiled code; a pair with the bytes of an element.
_LIKE = {
    torch.bfloat16: (np.uint16(0), 2),
    torch.float16: (np.int16(0), 2),
    torch.float32: (np.float32(0), 4),
    torch.int8: (np.int8(0), 1),
}
PIECE_TOKENS = 1024
"""Tokens of a piece of a row, doubled until it has no more pieces than :data:`MOST_PIECES`."""
MOST_PIECES = 32
MOST_THREADS = 256
_ITEM_COLUMNS = 7
_ARGUMENTS = 26

logger = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def missing() -> str | None:
    """Why numba cannot serve, or None if it can. Importing numba takes a second, so call this only if needed."""
    if not installed():
        return "numba is not installed; install distkv-dask[numba]"
    try:
        importlib.import_module(".numba_jit", __package__)
    except Exception as error:  # numba refuses versions of numpy that it does not know with errors of several classes
        return f"numba does not load: {type(error).__name__}: {error}"
    return None


def installed() -> bool:
    """Whether numba can be found; does not import it."""
    try:
        return importlib.util.find_spec("numba") is not None
    except ValueError:  # sys.modules holds None
        return False


@lru_cache(maxsize=len(_LIKE))
def compiled(kv_dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Machine code of ``plan``, ``attend_items`` and ``merge_parts`` for pools of a dtype.

    Compiling takes seconds the first time on a machine; later calls read numba's cache (``NUMBA_CACHE_DIR``).

    Raises
    ------
    ValueError
        Numba is not available; the message says why.
    """
    if (why := missing()) is not None:
        raise ValueError(f"implementation: 'numba' is not available: {why}")
    numba = importlib.import_module("numba")
    jit, planner = (importlib.import_module(name, __package__) for name in (".numba_jit", ".numba_plan"))
    types = numba.types
    arguments, items = types.UniTuple(types.int64, _ARGUMENTS), types.int64[:, ::1]
    numbers, floats = (types.int64, types.int64), (types.float64, types.float64)
    signatures = {
        planner.plan: (arguments, types.int64, items),
        jit.attend_items: (numba.typeof(_LIKE[kv_dtype][0]), arguments, *floats, items, *numbers, types.int64),
        planner.merge_parts: (arguments, items, *numbers),
    }
    made = []
    for function, signature in signatures.items():
        code = numba.njit(nogil=True)(function)
        try:
            code.enable_caching()
        except RuntimeError as error:
            logger.warning("numba cannot cache compiled kernels, so every process compiles its own: %s", error)
        code.compile(signature)
        code.disable_compile()
        made.append(code)
    plan, attend_items, merge_parts = made
    return plan, attend_items, merge_parts


def run(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend; see :func:`distkv_dask.kernels.micro_attention` for the contract."""
    plan, attend_items, merge_parts = compiled(call.k_pool.dtype)
    like, size = _LIKE[call.k_pool.dtype]
    q = call.q.float().contiguous()
    out, lse = call.empty_result()
    threads = min(call.threads, MOST_THREADS)
    arguments = _arguments(call, q, out, lse, size)
    tile = max(1, TILE_ROWS * call.k_pool.shape[1] // q.shape[1])
    most = (1 + MOST_PIECES) * len(call.lengths) + len(q) // tile  # a row is cut by queries or by tokens
    items = np.empty((most, _ITEM_COLUMNS), np.int64)
    status, count, floats = plan(arguments, tile, items)
    if status:
        raise _error(status, call)
    partials, counter = np.empty(floats, np.float32), np.zeros(1, np.int64)
    factors = float(call.scale), float(call.soft_cap or 0)
    work = like, arguments, *factors, items, count, partials.ctypes.data, counter.ctypes.data
    _share(attend_items, work, min(threads, count))
    if floats:
        merge_parts(arguments, items, count, partials.ctypes.data)
    return out, lse


def _arguments(call: Call, q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, size: int) -> tuple[int, ...]:
    """The first argument of all compiled functions: addresses, sizes and strides."""
    k, v, tables = call.k_pool, call.v_pool, call.block_tables
    blocks, kv_heads, block_tokens, d = k.shape
    pointers = [
        0 if x is None else x.data_ptr()
        for x in (
            q, k, v, tables, call.lengths, call.query_offsets, call.q_start, call.first_keys, call.k_scales,
            call.v_scales, out, lse,
        )
    ]  # fmt: skip
    return (
        *pointers, len(tables), q.shape[0], q.shape[1], kv_heads, d, block_tokens, blocks, tables.shape[1],
        tables.stride(0), k.stride(0), v.stride(0), v.shape[3], v.stride(2), size,
    )  # fmt: skip


def _share(function: Any, work: tuple[Any, ...], threads: int) -> None:
    """Run the same work on several threads; the caller does the work that late helpers leave."""
    helpers = [_helpers().submit(function, *work) for _ in range(threads - 1)]
    function(*work)
    for helper in helpers:
        if not helper.cancel():
            helper.result()


@lru_cache(maxsize=1)
def _helpers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "numba-attention")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_helpers.cache_clear)  # a child has none of its parent's threads


def _error(status: int, call: Call) -> ValueError:
    if status == 1:
        return ValueError(lengths_message(call.block_tables.shape[1], call.k_pool.shape[2]))
    if status == 2:
        return ValueError(offsets_message(call.q.shape[0]))
    return ValueError(tables_message(call.k_pool.shape[0]))
