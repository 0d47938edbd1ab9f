"""Parts of a holder that record their work; used instead of the plain ones while there is a trace.

Each overrides the few methods that start or end an activity; the plain classes do not know about traces.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter_ns

from distkv_dask.gang import Gang
from distkv_dask.worker.blocks.pool import Pool
from distkv_dask.worker.channels.base import Inlet
from distkv_dask.worker.channels.frames import Header
from distkv_dask.worker.holder.session import Session
from distkv_dask.worker.trace import Ring


class TracedSession(Session):
    """A holder's part in a gang with recorded requests: those answered by Python here, others by C++."""

    def __init__(self, ring: Ring, gang: Gang, pool: Pool) -> None:
        super().__init__(gang, pool)
        self._ring: Ring = ring

    def answer(self, inlet: Inlet, header: Header) -> None:
        """Append, attend and reply."""
        began = perf_counter_ns()
        try:
            super().answer(inlet, header)
        finally:
            self._ring.put("answer", began, header.gang, header.step, header.layer, inlet.peer, header.length)

    def _attend(self, header: Header) -> None:
        began = perf_counter_ns()
        super()._attend(header)
        self._ring.put("attend", began, header.gang, header.step, header.layer)

    def _reply_to(self, inlet: Inlet, header: Header) -> None:
        began = perf_counter_ns()
        super()._reply_to(inlet, header)
        self._ring.put("send", began, header.gang, header.step, header.layer, inlet.peer)


def traced_receive(ring: Ring, receive: Callable[[], Header | None]) -> Callable[[], Header | None]:
    """``receive`` of an inlet, recorded with the idle time since this lane last worked for the engine."""

    def receive_traced() -> Header | None:
        began = ring.put("idle", ring.last, -1) if ring.last else perf_counter_ns()
        header = receive()
        gang, step, layer = (header.gang, header.step, header.layer) if header is not None else (-1, -1, -1)
        ring.put("receive", began, gang, step, layer)
        return header

    return receive_traced
