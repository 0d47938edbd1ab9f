"""Where a task's time goes, told to Dask: the *Fine Performance Metrics* of its dashboard and its spans show it.

Dask takes what it is told in the task's own thread from the time that it measures itself, so the sum stays right.
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
    """Tell Dask how the time of a home's task divides: seconds by label as the yielded dict says, and the lane's rest.

    A task that fails tells nothing.
    """
    began = perf_counter()
    parts: dict[str, float] = {}
    yield parts
    parts["distkv wait for lane"] = perf_counter() - began - sum(parts.values())
    for label, seconds in parts.items():
        context_meter.digest_metric(label, max(seconds, 0.0), "seconds")


@contextmanager
def computing(parts: dict[str, float], exchanged: Callable[[], Exchanged]) -> Iterator[None]:
    """Measure a forward on the home lane, of which ``exchanged`` tells how long it dealt with holders."""
    began = perf_counter()
    yield
    done = exchanged()
    parts[SEND], parts[WAIT] = done.sending, done.waiting
    parts[COMPUTE] = perf_counter() - began - done.sending - done.waiting


@contextmanager
def metered_session() -> Iterator[list[SessionStats]]:
    """Tell Dask what a holder's session did, of which the stats are put into the yielded list."""
    began = perf_counter()
    done: list[SessionStats] = []
    yield done
    for stats in done:
        context_meter.digest_metric(COMPUTE, stats.busy_seconds, "seconds")
        context_meter.digest_metric("distkv idle", max(perf_counter() - began - stats.busy_seconds, 0.0), "seconds")
        context_meter.digest_metric("distkv queries", stats.bytes_in, "bytes")
        context_meter.digest_metric("distkv partials", stats.bytes_out, "bytes")
