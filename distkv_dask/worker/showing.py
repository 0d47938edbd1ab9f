"""Showing: the home lane tells the holder lane of its worker the progress of the chunks that it computes."""

from __future__ import annotations

from collections.abc import Sequence

from distkv_dask.worker.device import Device
from distkv_dask.worker.holder.lane import HolderLane
from distkv_dask.worker.under_way import UnderWay


class Showing:
    """Chunks of one forward, all of whose new KV is stored on this worker, for later chunks that follow them.

    Parameters
    ----------
    gangs
        Numbers of their gangs.
    under_way
        The progress that the holder lane reads.
    lane
        The holder lane.
    engine
        The engine's id.
    device
        The device that computes them.
    """

    def __init__(
        self, gangs: Sequence[int], under_way: UnderWay, lane: HolderLane, engine: str, device: Device
    ) -> None:
        self._gangs = gangs
        self._under_way = under_way
        self._lane = lane
        self._engine = engine
        self._device = device

    def stored(self, layer: int) -> None:
        """The KV of a layer is stored, or queued to be."""
        mark = self._device.mark()
        self._tell([self._under_way.stored(gang, layer, mark) for gang in self._gangs])

    def computed(self) -> None:
        """All of it is stored."""
        self._tell([self._under_way.computed(gang) for gang in self._gangs])

    def failed(self, reason: str) -> None:
        """It will not be."""
        self._tell([self._under_way.failed(gang, reason) for gang in self._gangs])

    def _tell(self, awaited: Sequence[bool]) -> None:
        if any(awaited):
            self._lane.go_on(self._engine)
