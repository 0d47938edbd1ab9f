"""How a transformers model reaches DistAttention: one attention function, registered as ``"distkv"``.

No mask function is registered under that name, so transformers builds no masks: the step knows the visible tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import AttentionInterface

from distkv_dask.geometry import Geometry
from distkv_dask.worker.model.latent import into_latents, is_absorbed, out_of_latents
from distkv_dask.worker.model.temperature import tempered

IMPLEMENTATION = "distkv"
"""Name of :func:`dist_attention` in transformers' registry."""


class AttentionStep(Protocol):
    """Attention of one forward call, for all its layers."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, sinks: Tensor | None = None) -> Tensor:
        """Append this layer's keys and values, and attend.

        Parameters
        ----------
        layer
            Number of the layer among those with attention, from 0; each is called once per forward, in order.
        q
            Queries of the flattened tokens, position embedding applied: contiguous [T, heads, head_dim] in the model's
            dtype.
        k, v
            Keys and values: contiguous [T, kv_heads, head_dim] and [T, kv_heads, value_dim] in the model's dtype.
        scale
            Factor on the scores.
        sinks
            [heads], if the layer has attention sinks: scores of a key that every query sees, with a value of zero.

        Returns
        -------
        Tensor
            [T, heads, value_dim] in the model's dtype.
        """
        ...


_running = threading.local()
"""Holds the step of the forward that runs on this thread. A keyword argument of the model would not work: not every
family passes unknown keywords on to its attention."""


@contextmanager
def attending_with(step: AttentionStep, positions: Tensor, geometry: Geometry) -> Iterator[None]:
    """Route the attention of models that run on this thread to ``step``.

    Parameters
    ----------
    step
        Computes attention.
    positions
        int64 [T] of the flattened tokens.
    geometry
        Sizes to which keys and values are padded.
    """
    _running.step, _running.positions, _running.geometry, _running.layer = step, positions, geometry, 0
    try:
        yield
    finally:
        del _running.step


def running_step() -> AttentionStep:
    """Return the step given to :func:`attending_with` on this thread."""
    return cast(AttentionStep, _running.step)


def running_positions() -> Tensor:
    """Return the positions given to :func:`attending_with` on this thread, int64 [T]."""
    return cast(Tensor, _running.positions)


def fits(kv_heads: int, head_dim: int) -> bool:
    """Whether keys and values of a layer with these sizes are stored as they are by the running step."""
    sizes: Geometry = _running.geometry
    return (sizes.kv_heads, sizes.head_dim, sizes.value_dim) == (kv_heads, head_dim, head_dim)


def attend_rows(query: Tensor, key: Tensor, value: Tensor, scale: float, sinks: Tensor | None = None) -> Tensor:
    """Attend with the running step in its next layer; see :meth:`AttentionStep.attend`."""
    _running.layer += 1
    return running_step().attend(_running.layer - 1, query, key, value, scale, sinks)


def dist_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend with the running step; the form is that of transformers' attention functions.

    What a layer sees and its soft cap were learned when the model was loaded (:mod:`.layer_kinds`). Layers with fewer
    KV heads or smaller heads than the pool are padded, which is exact: zeros add nothing to scores, and padded numbers
    of values are removed again.

    Parameters
    ----------
    module
        The layer's attention module; layers attend in the same order in every forward.
    query, key, value
        [n, heads, T, d], [n, kv_heads, T, d] and [n, kv_heads, T, dv]: one row of flattened tokens, or a row for each
        sequence.
    attention_mask
        None.
    scaling
        Factor on the scores; None is ``d ** -0.5``.
    s_aux
        Attention sinks [heads], or None.

    Returns
    -------
    tuple
        Output [n, T, heads, dv], and None for the weights.
    """
    sizes: Geometry = _running.geometry
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query = tempered(module, query, _running.positions)
    absorbed = is_absorbed(module)
    if absorbed:
        query = into_latents(module, query)
    out = attend_rows(
        _padded(query, query.shape[1], sizes.head_dim),
        _padded(key, sizes.kv_heads, sizes.head_dim),
        _padded(value, sizes.kv_heads, sizes.value_dim),
        scale,
        s_aux,
    )[..., : value.shape[-1]]
    rows = len(query), query.shape[2]
    return (out_of_latents(module, out) if absorbed else out).unflatten(0, rows), None


def _padded(tensor: Tensor, heads: int, size: int) -> Tensor:
    """Contiguous [n * T, heads, size] of [n, h, T, d]: each head repeated, and padded with zeros."""
    _, given, _, d = tensor.shape
    if given != heads:
        tensor = tensor.repeat_interleave(heads // given, 1)
    tensor = tensor.transpose(1, 2).flatten(0, 1)
    return tensor.contiguous() if d == size else torch.nn.functional.pad(tensor, (0, size - d))


AttentionInterface.register(IMPLEMENTATION, dist_attention)
