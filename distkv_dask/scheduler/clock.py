"""The clock of all engines: a tick every second, and how busy the scheduler was in between."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from time import monotonic, process_time, thread_time

from distkv_dask.scheduler.costs.pacer import Pacer
from distkv_dask.scheduler.tasks.submitter import Submitter

TICK_SECONDS = 1.0


async def run_clock(pacer: Pacer, submitter: Submitter, tick: Callable[[], None]) -> None:
    """Call ``tick`` every second, until cancelled, once the pacer knows the cost of the tasks that have ended."""
    # in a separate scheduler process, the loop is in the main thread; elsewhere other threads are a user's
    clock = process_time if threading.current_thread() is threading.main_thread() else thread_time
    while True:
        began, cpu, counted = monotonic(), clock(), submitter.ended
        await asyncio.sleep(TICK_SECONDS)
        tasks, others = (after - before for after, before in zip(submitter.ended, counted, strict=True))
        pacer.measured(monotonic() - began, clock() - cpu, tasks, others)
        tick()
