"""Append and MicroAttention of a batch whose rows are the same in all layers: one call into the core per layer.

In a decode step a layer's arithmetic takes tens of microseconds; two indexed writes and the checks of a call would
take as long again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import native_kernel
from .contract import slots_message
from .index import beside
from .native_structures import PackedLayers
from .prepared import PreparedAttention


class _Layer(NamedTuple):
    """One layer's attention and pools, and the shapes of its fresh keys and values."""

    attention: PreparedAttention
    k: torch.Tensor
    v: torch.Tensor
    fresh_k: tuple[int, ...]
    fresh_v: tuple[int, ...]
    values_in_keys: bool

    def takes(self, k: torch.Tensor, v: torch.Tensor | None) -> bool:
        """Whether fresh keys and values have the right shapes and dtype."""
        if k.shape != self.fresh_k or k.dtype != self.k.dtype:
            return False
        return self.values_in_keys if v is None else v.shape == self.fresh_v and v.dtype == self.k.dtype


class PreparedLayers:
    """Appends new KV to the layers of a pool and attends, for a batch with the same rows in all layers.

    Parameters
    ----------
    attentions
        MicroAttention of the batch for each kind of layer (with and without a window, for instance), prepared with the
        pool of such a layer. A layer's results are in the ``out`` and ``lse`` of its kind, which may share memory.
    of_layer
        Index of each layer's attention.
    k_layers, v_layers
        Every layer's keys and values: views of the form that its attention was prepared for.
    blocks, offsets
        int64 [appended]: block ids, and offsets within them, of new tokens. Values may be changed in place between
        calls, then call :meth:`refresh`. Keep them on the host, like index tensors.

    Raises
    ------
    TypeError, ValueError
        Bad input; the message names the argument and what was expected.
    """

    def __init__(
        self,
        attentions: Sequence[PreparedAttention],
        of_layer: Sequence[int],
        k_layers: Sequence[torch.Tensor],
        v_layers: Sequence[torch.Tensor],
        blocks: torch.Tensor,
        offsets: torch.Tensor,
    ) -> None:
        if not len(of_layer) == len(k_layers) == len(v_layers) or any(
            not 0 <= kind < len(attentions) for kind in of_layer
        ):
            raise ValueError(
                f"of_layer, k_layers, v_layers: expected one entry per layer and of_layer from 0 to "
                f"{len(attentions) - 1}, got {list(of_layer)}, {len(k_layers)} and {len(v_layers)} pools"
            )
        for name, slots in (("blocks", blocks), ("offsets", offsets)):
            if slots.dtype != torch.int64 or slots.shape != blocks.shape or slots.ndim != 1:
                raise ValueError(f"{name}: expected int64 [appended], got {slots.dtype} {tuple(slots.shape)}")
        self._attentions = list(attentions)
        self._given = blocks, offsets
        self._slots = beside(blocks, k_layers[0].device), beside(offsets, k_layers[0].device)
        self._layers = [
            _layer(attentions[kind], k, v, len(blocks)) for kind, k, v in zip(of_layer, k_layers, v_layers, strict=True)
        ]
        self.queued = all(attention.batch is not None for attention in attentions)
        """Whether a call only queues work on a card, always in the same memory, so that a graph can capture it."""
        for attention in attentions:
            if attention.batch is not None:
                attention.batch.take_slots(blocks, offsets)
        packed = [one for layer in self._layers if (one := layer.attention.packed) is not None]
        self.native: PackedLayers | None = None
        """The first argument of the core's ``distkv_layer``, for native callers; None if the C++ core is not used."""
        if len(packed) == len(self._layers):
            self.native = native_kernel.pack_layers(packed, k_layers, v_layers, blocks, offsets)

    def refresh(self) -> None:
        """Use the current values of lengths, starts, first keys and slots for all layers of a step.

        Raises
        ------
        ValueError
            On a GPU: a length, block id or slot is out of range. Other implementations raise that when called.
        """
        for attention in self._attentions:
            attention.refresh()
        if self.queued:
            return  # slots were copied with the work lists
        for given, used in zip(self._given, self._slots, strict=True):
            if used is not given:
                used.copy_(given, non_blocking=True)

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, scale: float) -> None:
        """Append and attend; the results are in the ``out`` and ``lse`` of the layer's attention.

        Parameters
        ----------
        layer
            Index of the layer.
        q
            [tokens, heads, d] of the pool's dtype.
        k, v
            [appended, kv_heads, d] and [appended, kv_heads, dv] of the same dtype; v may be None, and is not read,
            where the layer's values are the first numbers of its keys.
        scale
            Factor of the scores.

        Raises
        ------
        TypeError, ValueError
            Tensors are not like those prepared for, or a length, block id or slot is out of range.
        """
        if not 0 <= layer < len(self._layers):
            raise ValueError(slots_message())
        of = self._layers[layer]
        if not of.takes(k, v):
            got = tuple(k.shape), None if v is None else tuple(v.shape)
            raise ValueError(f"k, v: expected {of.k.dtype} {of.fresh_k} and {of.fresh_v}, got {got[0]} and {got[1]}")
        call = of.attention.call
        plain = q.is_contiguous() and k.is_contiguous() and (v is None or v.is_contiguous())
        fits = q.shape == call.q.shape and q.dtype == call.q.dtype and 0 < scale < math.inf
        if self.native is not None and plain and fits:
            native_kernel.run_layer(self.native, call, layer, q, k, v, scale)
            return
        self._append(of, k, v)
        of.attention(q, of.k, of.v, scale)

    def _append(self, layer: _Layer, k: torch.Tensor, v: torch.Tensor | None) -> None:
        values = None if layer.values_in_keys else v
        if layer.attention.batch is not None:
            layer.attention.batch.append(k, values, layer.k, layer.v)
            return
        for pool, fresh in ((layer.k, k), (layer.v, values)):
            if fresh is not None and len(fresh):
                pool.transpose(1, 2).index_put_(self._slots, fresh)


def _layer(attention: PreparedAttention, k: torch.Tensor, v: torch.Tensor, appended: int) -> _Layer:
    """A layer whose pools were checked."""
    attention.check_pools(k, v)
    kv_heads = k.shape[1]
    call = attention.call._replace(k_pool=k, v_pool=v)
    return _Layer(
        attention, k, v, (appended, kv_heads, k.shape[3]), (appended, kv_heads, v.shape[3]), call.values_in_keys
    )
