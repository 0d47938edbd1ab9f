"""Append and MicroAttention of a batch whose rows stay the same from layer to layer: one call into the core per layer.

In a decode step a layer's arithmetic takes tens of microseconds; two indexed writes and the checks of a call take as
long again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .index import beside
from .prepared import PreparedAttention


class PreparedLayers:
    """Appends new KV to the layers of a pool and attends, for a batch that stays the same.

    Parameters
    ----------
    attention
        MicroAttention of the batch, prepared with the first layer's pool; its ``out`` and ``lse`` take the results.
    k_layers, v_layers
        Every layer's keys and values: views of the form that ``attention`` was prepared for.
    blocks, offsets
        int64 [appended]: block ids and offsets within them, where new tokens go. Values may be changed in place between
        calls, then call :meth:`refresh`. As index tensors, they should lie on the host.

    Raises
    ------
    TypeError, ValueError
        Bad input; the message names the argument and what was expected.
    """

    def __init__(
        self,
        attention: PreparedAttention,
        k_layers: Sequence[torch.Tensor],
        v_layers: Sequence[torch.Tensor],
        blocks: torch.Tensor,
        offsets: torch.Tensor,
    ) -> None:
        self._attention = attention
        self._k, self._v = list(k_layers), list(v_layers)
        self._given = blocks, offsets
        device = k_layers[0].device
        self._slots = beside(blocks, device), beside(offsets, device)
        shape = (blocks.numel(), *attention.kv_shape)
        self._fresh = shape, attention.out.shape, k_layers[0].dtype
        for k, v in zip(k_layers, v_layers, strict=True):
            attention.check_pools(k, v)
        for name, slots in (("blocks", blocks), ("offsets", offsets)):
            if slots.dtype != torch.int64 or slots.shape != blocks.shape or slots.ndim != 1:
                raise ValueError(f"{name}: expected int64 [appended], got {slots.dtype} {tuple(slots.shape)}")
        if attention.batch is not None:
            attention.batch.take_slots(blocks, offsets)
        self.native = attention.pack_layers(self._k, self._v, blocks, offsets)
        """For native callers: the first argument of the core's ``distkv_layer``; None when
        the C++ core does not serve."""

    def refresh(self) -> None:
        """Take the values of lengths, starts and slots as they are now, once for all layers of a step.

        Raises
        ------
        ValueError
            On a GPU: a length, block id or slot is out of range. Other implementations find that when called.
        """
        self._attention.refresh()
        for given, used in zip(self._given, self._slots, strict=True):
            if used is not given and self._attention.batch is None:
                used.copy_(given, non_blocking=True)

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> None:
        """Append and attend; the results are in the ``out`` and ``lse`` of the attention.

        Parameters
        ----------
        layer
            Index of the layer.
        q
            [tokens, heads, d] of the pool's dtype.
        k, v
            [appended, kv_heads, d] of the same dtype.
        scale
            Factor of the scores.

        Raises
        ------
        TypeError, ValueError
            Tensors are not like those prepared for, or a length, block id or slot is out of range.
        """
        fresh, queries, dtype = self._fresh
        if k.shape != fresh or v.shape != fresh or k.dtype != dtype or v.dtype != dtype:
            raise ValueError(f"k, v: expected {dtype} {fresh}, got {tuple(k.shape)} and {tuple(v.shape)}")
        plain = q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
        if self.native is not None and plain and q.shape == queries and q.dtype == dtype and 0 < scale < math.inf:
            self._attention.run_layer(self.native, layer, q, k, v, scale)
            return
        batch = self._attention.batch
        if batch is not None:
            batch.append(k, v, self._k[layer], self._v[layer])
        elif fresh[0]:
            blocks, offsets = self._slots
            self._k[layer].transpose(1, 2).index_put_((blocks, offsets), k)
            self._v[layer].transpose(1, 2).index_put_((blocks, offsets), v)
        self._attention(q, self._k[layer], self._v[layer], scale)
