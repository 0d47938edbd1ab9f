"""The time of a worker's two lanes: spans in ring buffers of bounded size, recorded while ``distkv.trace`` is set."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from distkv_dask.messages.names import Span, Spans
from distkv_dask.worker.native.marks import NativeMarks, Recorded

CAPACITY = 50_000
"""Spans that a lane keeps until the engine fetches them (about 12 MB); if it is too late, the oldest are lost."""


class Ring:
    """Spans of one lane. One thread records, another fetches.

    Times are read with :func:`time.perf_counter_ns`, which never jumps, and compared between processes by
    :func:`time.time_ns`; the offset is measured once.
    """

    def __init__(self) -> None:
        self.last = 0
        """End of the last recorded span (:func:`time.perf_counter_ns`), 0 when there is none yet."""
        self.native = NativeMarks()
        """Buffer in which C++ records this lane's work without Python, until :meth:`collect`."""
        self._spans: deque[Recorded] = deque(maxlen=CAPACITY)
        self._lost = 0
        self._offset = time.time_ns() - time.perf_counter_ns()

    def put(
        self, name: str, began: int, gang: int, step: int = -1, layer: int = -1, peer: str = "", size: int = -1
    ) -> int:
        """Record a span that ends now; see :class:`~distkv_dask.messages.names.Span`, except for ``began``.

        Parameters
        ----------
        began
            Its start, by :func:`time.perf_counter_ns`.

        Returns
        -------
        int
            Its end, by the same clock.
        """
        ended = time.perf_counter_ns()
        self._add((name, began, ended, gang, step, layer, peer, size))
        return ended

    def collect(self) -> None:
        """Add the spans that C++ has recorded, by the same clock."""
        self._lost += self.native.take_lost()
        for one in self.native.take_marks():
            self._add(one)

    def _add(self, one: Recorded) -> None:
        if len(self._spans) == CAPACITY:
            self._lost += 1
        self.last = one[2]
        self._spans.append(one)

    def take_spans(self) -> Spans:
        """Spans recorded since the last call, and how many were lost; from any one thread."""
        offset, lost = self._offset, self._lost
        self._lost = 0
        taken = (Span(*self._spans.popleft()) for _ in range(len(self._spans)))
        return Spans([one._replace(began=one.began + offset, ended=one.ended + offset) for one in taken], lost)


def span(ring: Ring | None, name: str, gang: int, size: int) -> AbstractContextManager[None]:
    """Record the time inside a ``with`` statement, if there is a ring."""
    return nullcontext() if ring is None else _span(ring, name, gang, size)


@contextmanager
def _span(ring: Ring, name: str, gang: int, size: int) -> Iterator[None]:
    began = time.perf_counter_ns()
    try:
        yield
    finally:
        ring.put(name, began, gang, size=size)


class Tracer:
    """Rings of one engine on one worker."""

    def __init__(self) -> None:
        self.home = Ring()
        self.holder = Ring()

    def take_spans(self) -> dict[str, Spans]:
        """Spans of both lanes since the last call."""
        return {"home lane": self.home.take_spans(), "holder lane": self.holder.take_spans()}
