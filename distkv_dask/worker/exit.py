"""Ends a worker's process that can no longer use its card."""

from __future__ import annotations

import os
import threading

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
