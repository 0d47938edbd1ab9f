"""Engines in tasks: a task that waits for an engine must not hold the worker's thread that the engine needs."""

from __future__ import annotations

from distributed import Client, get_worker
from distributed.threadpoolexecutor import thread_state

from distkv_dask.errors import ClusterError


def check_seceded(client: Client) -> None:
    """Raise :class:`ClusterError` in a task that holds a thread of a worker of the client's cluster."""
    if not getattr(thread_state, "proceed", False):  # not a thread of Dask's pools, or one that has seceded
        return
    try:
        worker = get_worker()
    except ValueError:
        return
    if client.scheduler is None or client.scheduler.address != worker.scheduler.address:
        return
    raise ClusterError(
        f"this task holds a thread of worker {worker.address}, which the engine needs while the task waits for it: "
        "call distributed.secede() in the task before Engine.attach or Engine"
    )
