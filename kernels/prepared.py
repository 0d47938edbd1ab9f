"""MicroAttention and merge of tensors that stay the same for many layers: checked once, then passed as pointers.

Within a step only the queries and the layer change. :func:`distkv_dask.kernels.micro_attention` checks every argument
each time, which takes longer than the arithmetic of a short sequence.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from . import native_kernel
from .contract import Call, check_call
from .dispatch import IMPLEMENTATIONS, choose
from .index import Index
from .merge import check_index, check_merge, index_message, merge_rows, native_serves
from .triton_batch import TritonBatch


class PreparedAttention:
    """MicroAttention of a batch whose rows are the same in every call.

    Parameters
    ----------
    tokens, heads
        Queries of all rows, and query heads.
    k_pool, v_pool
        Views like those of every later call: [blocks, kv_heads, block_tokens, d].
    block_tables, lengths, query_offsets, causal, q_start, first_keys, soft_cap
        As for :func:`distkv_dask.kernels.micro_attention`. Values of lengths, starts and first keys may be changed in
        place between calls, then call :meth:`refresh`. Keep them on the host even for a pool on a GPU, so that nothing
        waits for the GPU.
    threads
        Maximum CPU threads; None: ``torch.get_num_threads()`` of the calling thread.
    result
        Contiguous memory for :attr:`result`, such as a part of what :class:`PreparedMerges` merges; None: new memory.

    Raises
    ------
    TypeError, ValueError
        Bad input; the message names the argument and what was expected.
    """

    def __init__(
        self,
        tokens: int,
        heads: int,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        block_tables: torch.Tensor,
        lengths: torch.Tensor,
        *,
        query_offsets: torch.Tensor | None = None,
        causal: bool = False,
        q_start: torch.Tensor | None = None,
        threads: int | None = None,
        result: torch.Tensor | None = None,
        first_keys: torch.Tensor | None = None,
        soft_cap: float | None = None,
    ) -> None:
        d, d_v = k_pool.shape[-1], v_pool.shape[-1]
        q = torch.empty(tokens, heads, d, dtype=k_pool.dtype, device=k_pool.device)
        self._given = Index(block_tables, lengths, query_offsets, q_start, first_keys)
        self._index = index = self._given.on(k_pool.device)
        self._call = Call(
            q, k_pool, v_pool, *index[:2], 1.0, index.query_offsets, causal, index.q_start, None, None,
            torch.get_num_threads() if threads is None else threads, index.first_keys, soft_cap,
        )  # fmt: skip
        check_call(self._call)
        self._form = _form(q, k_pool, v_pool)
        self.result = _memory(result, tokens * heads * (d_v + 1), k_pool.device)
        """float32 [tokens * heads * (dv + 1)]: memory of :attr:`out`, then of :attr:`lse`."""
        self.out = self.result[: tokens * heads * d_v].view(tokens, heads, d_v)
        """float32 [tokens, heads, dv]: outputs of the last call."""
        self.lse = self.result[tokens * heads * d_v :].view(tokens, heads)
        """float32 [tokens, heads]: log-sum-exps of the last call."""
        name = choose(k_pool.device.type, k_pool.dtype, d, k_pool.shape[2]).name
        self._run = IMPLEMENTATIONS[name]
        self.packed = native_kernel.pack(self._call, self.out, self.lse) if name == "native" else None
        """The call as the C++ core takes it; None if another implementation is used."""
        self.batch = TritonBatch(self._call, self._given, self.out, self.lse) if name == "triton" else None
        """The batch for Triton; None if another implementation is used."""

    @property
    def call(self) -> Call:
        """A call with the prepared arguments."""
        return self._call

    def refresh(self) -> None:
        """Use the current values of lengths, starts and first keys for all layers of a step.

        Raises
        ------
        ValueError
            On a GPU: a length or block id is out of range. Other implementations raise that when called.
        """
        if self.batch is not None:
            self.batch.refresh()
            return
        for given, used in zip(self._given, self._index, strict=True):
            if given is not None and used is not None and used is not given:
                used.copy_(given, non_blocking=True)

    def check_pools(self, k_pool: torch.Tensor, v_pool: torch.Tensor) -> None:
        """Raise ValueError for pools that a call would refuse."""
        if _form(self._call.q, k_pool, v_pool) != self._form:
            raise ValueError(
                "k_pool, v_pool: expected tensors of the shape, strides and dtype prepared for; "
                f"got {tuple(k_pool.shape)} and {tuple(v_pool.shape)}"
            )

    def __call__(self, q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, scale: float) -> None:
        """Attend; :attr:`out` and :attr:`lse` are overwritten.

        Parameters
        ----------
        q
            Contiguous [tokens, heads, d] of the pool's dtype.
        k_pool, v_pool
            Of the shape, strides and dtype given before.
        scale
            Factor of the scores.

        Raises
        ------
        TypeError, ValueError
            Tensors are not like those prepared for, or a length or block id is out of range.
        """
        if _form(q, k_pool, v_pool) != self._form or not 0 < scale < math.inf:
            check_call(self._call._replace(q=q, k_pool=k_pool, v_pool=v_pool, scale=scale))
            raise ValueError(
                "q, k_pool, v_pool: expected tensors of the shapes, strides and dtypes prepared for; "
                f"got {tuple(q.shape)}, {tuple(k_pool.shape)} and {tuple(v_pool.shape)}"
            )
        if self.packed is not None and q.is_contiguous():
            native_kernel.run_packed(self.packed, self._call, q, k_pool, v_pool, scale)
            return
        if self.batch is not None:
            self.batch.attend(q, k_pool, v_pool, scale)
            return
        out, lse = self._run(self._call._replace(q=q, k_pool=k_pool, v_pool=v_pool, scale=scale))
        self.out.copy_(out)
        self.lse.copy_(lse)


class PreparedMerge:
    """Repeated :func:`distkv_dask.kernels.merge_into` of the same tensors; see there for the parameters.

    The values of ``index`` must not change.

    Raises
    ------
    TypeError, ValueError
        Bad input; the message names the argument and what was expected.
    """

    def __init__(
        self,
        out: torch.Tensor,
        lse: torch.Tensor,
        part_out: torch.Tensor,
        part_lse: torch.Tensor,
        index: torch.Tensor | None = None,
    ) -> None:
        self._tensors = (out, lse, part_out, part_lse, index)
        check_merge(*self._tensors)
        self._packed = native_kernel.pack_merge(*self._tensors) if native_serves(*self._tensors) else None
        if self._packed is None and index is not None:
            check_index(index, len(out))

    def __call__(self) -> None:
        """Merge the current partial into ``out`` and ``lse``.

        Raises
        ------
        ValueError
            An index is out of range or given twice.
        """
        if self._packed is None:
            merge_rows(*self._tensors)
        elif not native_kernel.merge_packed(self._packed):
            raise ValueError(index_message(len(self._tensors[0])))


def _memory(given: torch.Tensor | None, size: int, device: torch.device) -> torch.Tensor:
    """Memory for results: the caller's, checked, or new."""
    if given is None:
        return torch.empty(size, dtype=torch.float32, device=device)
    if given.shape != (size,) or given.dtype != torch.float32 or given.device != device:
        got = f"{given.dtype} {tuple(given.shape)} on {given.device}"
        raise ValueError(f"result: expected float32 [{size}] on {device}, got {got}")
    return given


def _form(q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor) -> tuple[Any, ...]:
    return q.shape, q.dtype, k_pool.shape, k_pool.stride(), k_pool.dtype, v_pool.shape, v_pool.stride(), v_pool.dtype
