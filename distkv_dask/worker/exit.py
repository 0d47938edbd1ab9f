"""Ends of a worker's process: with a failed card, and without a last garbage collection."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from multiprocessing.util import Finalize

from distributed import Worker


async def end_process(worker: Worker, reason: str, limit: float) -> None:
    """Close a worker, so that its nanny starts another process in place of this one.

    Parameters
    ----------
    worker
        The worker.
    reason
        The reason, for its log.
    limit
        Seconds after which the process ends in any case, if there is a nanny: a call to a dead card may never return.
    """
    if worker.nanny is not None:
        timer = threading.Timer(limit, os._exit, (1,))
        timer.daemon = True
        timer.start()
    await worker.close(nanny=False, executor_wait=False, reason=reason)


def end_without_collection() -> None:
    """Let this process, which a nanny started, end as soon as its exit handlers have run.

    Python's last garbage collection goes through all objects of torch, on busy processors for longer than a nanny
    waits. If it were only told to skip them (``gc.freeze``), Triton's bindings would report them as leaked. A process
    that fails at its end is left to Python, because only Python knows its exit status.
    """
    Finalize(None, _prepare, exitpriority=0)  # runs when the process's function has ended


def _prepare() -> None:
    atexit.unregister(_end)
    if sys.exc_info()[0] is None:
        atexit.register(_end)  # last, so that it runs before all others


def _end() -> None:
    atexit.unregister(_end)
    try:
        atexit._run_exitfuncs()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError, ValueError):  # None or closed
                stream.flush()
        os._exit(0)
