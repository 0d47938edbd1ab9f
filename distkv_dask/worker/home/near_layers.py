"""Attention of a model with some layers whose KV is only at the home, and others with KV on any workers."""

from __future__ import annotations

import torch

from distkv_dask.gang import Exchanged
from distkv_dask.geometry import Geometry
from distkv_dask.worker.by_layer.attention import LayerAttention
from distkv_dask.worker.home.attention import DistAttention


class SplitAttention:
    """Called by a model's attention layers if their KV is in two pools.

    Parameters
    ----------
    geometry
        Says which layers are where.
    far
        Attention of the distributed layers.
    near
        Attention of the layers at the home, which needs no holders.
    """

    def __init__(self, geometry: Geometry, far: DistAttention | LayerAttention, near: DistAttention) -> None:
        self.far = far
        self._near = near
        self._parts: dict[int, tuple[DistAttention | LayerAttention, int]] = {
            **{layer: (far, at) for at, layer in enumerate(geometry.far_layers)},
            **{layer: (near, at) for at, layer in enumerate(geometry.home_layers)},
        }

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Attention of one layer, as :meth:`distkv_dask.worker.home.attention.DistAttention.attend`."""
        part, at = self._parts[layer]
        return part.attend(at, q, k, v, scale, sinks)

    @property
    def queued(self) -> bool:
        """Whether :meth:`attend` only queues work on a card, always in the same memory."""
        return self.far.queued and self._near.queued

    @property
    def exchanged(self) -> Exchanged:
        """What was exchanged with holders so far."""
        return self.far.exchanged

    def advance(self) -> None:
        """Advance to the next step."""
        self.far.advance()
        self._near.advance()

    def close(self) -> None:
        """Forget the channels."""
        self.far.close()
        self._near.close()
