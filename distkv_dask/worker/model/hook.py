"""How a transformers model reaches DistAttention: one attention function, registered as ``"distkv"``.

No mask function is registered under that name, so transformers builds no masks: the step knows who sees what.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import AttentionInterface

IMPLEMENTATION = "distkv"
"""Name of :func:`dist_attention` in transformers' registry."""


class AttentionStep(Protocol):
    """Attention of one forward call, for all its layers."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Append this layer's keys and values, and attend.

        Parameters
        ----------
        layer
            Index of the layer, from 0; each layer is called once per forward, in order.
        q
            Queries of the flattened tokens, position embedding applied: contiguous [T, heads, head_dim] in the model's
            dtype.
        k, v
            Keys and values: contiguous [T, kv_heads, head_dim] in the model's dtype.
        scale
            Factor on the scores.

        Returns
        -------
        Tensor
            [T, heads, head_dim] in the model's dtype.
        """
        ...


_running = threading.local()
"""Holds the step of the forward that runs on this thread. A keyword given to the model would not do: not every family
hands keywords that it does not know down to its attention."""


@contextmanager
def attending_with(step: AttentionStep) -> Iterator[None]:
    """Route the attention of models that run on this thread to ``step``."""
    _running.step = step
    try:
        yield
    finally:
        del _running.step


def running_step() -> AttentionStep:
    """Return the step given to :func:`attending_with` on this thread."""
    return cast(AttentionStep, _running.step)


def dist_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend with the running step; the form is that of transformers' attention functions.

    Keywords that would change the result (a sliding window, a soft cap, sinks) were refused when the model was loaded.

    Parameters
    ----------
    module
        The layer's attention module, which knows its ``layer_idx``.
    query, key, value
        [1, heads, T, head_dim] and twice [1, kv_heads, T, head_dim].
    attention_mask
        None.
    scaling
        Factor on the scores; None is ``head_dim ** -0.5``.

    Returns
    -------
    tuple
        Output [1, T, heads, head_dim], and None for the weights.
    """
    out = running_step().attend(
        cast(int, module.layer_idx),
        query[0].transpose(0, 1).contiguous(),
        key[0].transpose(0, 1).contiguous(),
        value[0].transpose(0, 1).contiguous(),
        query.shape[-1] ** -0.5 if scaling is None else scaling,
    )
    return out.unsqueeze(0), None


AttentionInterface.register(IMPLEMENTATION, dist_attention)
