"""Makes the attention of a home's steps: cut by the workers that hold KV, and by the pools of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from distkv_dask.geometry import Geometry
from distkv_dask.worker.blocks.pool import Pool
from distkv_dask.worker.by_layer.attention import LayerAttention
from distkv_dask.worker.by_layer.paused import PausedForward
from distkv_dask.worker.home.attention import DistAttention
from distkv_dask.worker.home.decode import Attention
from distkv_dask.worker.home.gang import HomeGang
from distkv_dask.worker.home.near_layers import SplitAttention
from distkv_dask.worker.home.traced import TracedAttention
from distkv_dask.worker.home.windows import Windows
from distkv_dask.worker.plan import Part, Stored, cut
from distkv_dask.worker.trace import Ring

if TYPE_CHECKING:
    from distkv_dask.worker.stages.links import StageLinks


class StepAttention:
    """Makes the attention of steps, for all gangs of one engine on one worker.

    Parameters
    ----------
    pool
        The worker's pool.
    geometry
        The model.
    windows
        KV of layers that stays at the home, if the model has such.
    alike
        Whether each token is a separate row, as :func:`distkv_dask.worker.plan.cut` has it.
    ring
        Where a trace records; None without one.
    """

    def __init__(self, pool: Pool, geometry: Geometry, windows: Windows | None, alike: bool, ring: Ring | None) -> None:
        self._pool = pool
        self._geometry = geometry
        self._windows = windows
        self._alike = alike
        self._ring = ring
        self.links: StageLinks | None = None
        """Channels to further stages, if other workers have layers."""

    def cut(self, batch: Sequence[Stored]) -> dict[str, Part]:
        """Parts of a step by worker."""
        return cut(batch, self._alike)

    def attention(
        self, gang: HomeGang | PausedForward, parts: Mapping[str, Part], batch: Sequence[Stored], step: int
    ) -> Attention:
        """Attention of a gang's steps from number ``step`` on, until the batch changes, from their parts by worker."""
        tokens = sum(one.queries for one in batch)
        far, windows = self._far(gang, parts, tokens, step), self._windows
        if windows is None:
            return far
        near = DistAttention(None, self.cut(windows.stored(batch)), tokens, windows.pool, self._geometry.heads)
        return SplitAttention(self._geometry, far, near)

    def _far(
        self, gang: HomeGang | PausedForward, parts: Mapping[str, Part], tokens: int, step: int
    ) -> DistAttention | LayerAttention:
        if isinstance(gang, PausedForward):
            return LayerAttention(gang, parts, self._pool)
        of = gang, parts, tokens, self._pool, self._geometry.heads
        attention = DistAttention(*of) if self._ring is None else TracedAttention(self._ring, *of)
        attention.step = step
        if self.links is not None:
            attention.further = self.links.step(gang.gang, step, self._pool, parts[gang.gang.home], tokens)
        return attention
