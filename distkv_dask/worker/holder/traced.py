"""The running parts of a holder that record what they do; used in the place of the plain ones while there is a trace.

Each overrides the few methods that begin or end a kind of time; the plain classes do not know about traces.
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
    """A holder's part in a gang whose requests are recorded: here those that Python answers, by C++ its own."""

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
    """``receive`` of an inlet, recorded, as is the time since this lane did something for the engine."""

    def receive_traced() -> Header | None:
        began = ring.put("idle", ring.last, -1) if ring.last else perf_counter_ns()
        header = receive()
        gang, step, layer = (header.gang, header.step, header.layer) if header is not None else (-1, -1, -1)
        ring.put("receive", began, gang, step, layer)
        return header

    return receive_traced
