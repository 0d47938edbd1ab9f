"""Llama 4's attention temperatures, by position: its own code counts positions from the start of each call.

Layers without rotary embeddings scale queries by ``1 + attn_scale * log(1 + floor((position + 1) / floor_scale))``
(arXiv 2501.19399; ``Llama4TextAttention`` in transformers).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_SCALES = "distkv_temperature"


def take_temperatures(attentions: Iterable[Any]) -> None:
    """Switch temperatures off in attention modules' own code; :func:`tempered` computes them from now on."""
    for module in attentions:
        if getattr(module, "attn_temperature_tuning", False):
            module.attn_temperature_tuning = False
            if not module.use_rope:
                setattr(module, _SCALES, (module.floor_scale, module.attn_scale))


def tempered(module: torch.nn.Module, query: Tensor, positions: Tensor) -> Tensor:
    """Queries at their temperatures.

    Parameters
    ----------
    module
        The layer's attention.
    query
        [b, heads, t, d].
    positions
        int64 [b * t].
    """
    scales = vars(module).get(_SCALES)  # looking for a missing attribute of a module is slow
    if scales is None:
        return query
    floor, factor = scales
    temperatures = torch.log1p(torch.floor((positions.float() + 1.0) / floor)) * factor + 1.0
    scaled: Tensor = query * temperatures.view(len(query), 1, -1, 1)
    return scaled.to(query.dtype)
