"""Attention of a model of which some layers have their KV at the home alone, the others on any workers."""

from __future__ import annotations

import torch

from distkv_dask.gang import Exchanged
from distkv_dask.geometry import Geometry
from distkv_dask.kernels import merge_sinks
from distkv_dask.worker.blocks.pool import Pool
from distkv_dask.worker.by_layer.attention import LayerAttention
from distkv_dask.worker.home.attention import DistAttention, Local
from distkv_dask.worker.plan import Part


class NearAttention:
    """Attention of the layers at the home, over one row of its pool for each sequence.

    Parameters
    ----------
    part
        The step's rows there.
    tokens
        New tokens in a step.
    pool
        The layers' pool.
    heads
        Query heads of the model.
    """

    def __init__(self, part: Part, tokens: int, pool: Pool, heads: int) -> None:
        self._local = Local(part, tokens, pool, heads, None)
        out = self._local.shard.out
        self._result = out if pool.dtype == torch.float32 else torch.empty_like(out, dtype=pool.dtype)

    @property
    def queued(self) -> bool:
        """Whether :meth:`attend` only queues work on a card, always in the same memory."""
        return self._local.shard.queued

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Attention of one layer, as :meth:`distkv_dask.worker.home.attention.DistAttention.attend`."""
        self._local.attend(layer, q, k, v, scale)
        out = self._local.shard.out
        if sinks is not None:
            merge_sinks(out, self._local.shard.lse, sinks)
        return out if self._result is out else self._result.copy_(out)

    def advance(self) -> None:
        """Go on to the next step."""
        self._local.shard.advance()


class SplitAttention:
    """What a model's attention layers call where they have their KV in two pools.

    Parameters
    ----------
    geometry
        Says which layers are where.
    far
        Attention of the distributed layers.
    near
        Attention of the layers at the home.
    """

    def __init__(self, geometry: Geometry, far: DistAttention | LayerAttention, near: NearAttention) -> None:
        self.far = far
        self._near = near
        self._parts: dict[int, tuple[DistAttention | LayerAttention | NearAttention, int]] = {
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
        """Go on to the next step."""
        self.far.advance()
        self._near.advance()

    def close(self) -> None:
        """Forget the channels."""
        self.far.close()
