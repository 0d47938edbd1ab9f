"""Reports a task's time by activity to Dask's *Fine Performance Metrics* and spans.

Dask subtracts times reported in the task's own thread from the time that it measures, so the sum stays right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from distributed.metrics import context_meter

from distkv_dask.gang import Exchanged
from distkv_dask.worker.holder.session import SessionStats

COMPUTE, SEND, WAIT = "distkv compute", "distkv send queries", "distkv wait for partials"


@contextmanager
def metered() -> Iterator[dict[str, float]]:
    """Report a home task's time to Dask: seconds by label from the yielded dict, and the rest as waiting for the lane.

    A failed task reports nothing.
    """
    began = perf_counter()
    parts: dict[str, float] = {}
    yield parts
    parts["distkv wait for lane"] = perf_counter() - began - sum(parts.values())
    for label, seconds in parts.items():
        context_meter.digest_metric(label, max(seconds, 0.0), "seconds")


@contextmanager
def computing(parts: dict[str, float], exchanged: Callable[[], Exchanged]) -> Iterator[None]:
    """Measure a forward on the home lane; ``exchanged`` has its time with holders."""
    began = perf_counter()
    yield
    done = exchanged()
    parts[SEND], parts[WAIT] = done.sending, done.waiting
    parts[COMPUTE] = perf_counter() - began - done.sending - done.waiting


@contextmanager
def metered_session() -> Iterator[list[SessionStats]]:
    """Report a holder's session to Dask; its stats are put into the yielded list."""
    began = perf_counter()
    done: list[SessionStats] = []
    yield done
    for stats in done:
        context_meter.digest_metric(COMPUTE, stats.busy_seconds, "seconds")
        context_meter.digest_metric("distkv idle", max(perf_counter() - began - stats.busy_seconds, 0.0), "seconds")
        context_meter.digest_metric("distkv queries", stats.bytes_in, "bytes")
        context_meter.digest_metric("distkv partials", stats.bytes_out, "bytes")
