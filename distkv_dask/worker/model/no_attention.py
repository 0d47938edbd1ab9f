"""Replaces attention when only the model's other computations matter."""

from __future__ import annotations

import torch


class NoAttention:
    """Returns a layer's queries.

    Parameters
    ----------
    value_dim
        Numbers of a value of one head.
    """

    def __init__(self, value_dim: int) -> None:
        self._value_dim = value_dim

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """First numbers of the queries, [T, heads, value_dim]."""
        return q[..., : self._value_dim]
