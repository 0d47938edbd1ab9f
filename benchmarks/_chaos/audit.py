"""Leaks: blocks, sequences, tasks, sockets, threads, files and processes that are no longer needed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
from distributed import Client, Scheduler, Worker
from distributed.core import Status

from distkv_dask.scheduler.engines.engine import EngineState

SETTLE = 30.0
"""Time in which running work may still end, in seconds."""

OURS = ("prefill-", "decode-", "attend-", "layer-")
"""Prefixes of the engine's task keys."""


def settled(look: Callable[[], list[str]], seconds: float = SETTLE) -> list[str]:
    """What is left after ``seconds``; returns early when nothing is left."""
    deadline = time.monotonic() + seconds
    while (left := look()) and time.monotonic() < deadline:
        time.sleep(0.25)
    return left


def engine_leaks(client: Client, state: EngineState) -> list[str]:
    """What the ledger and the workers' pools still hold for an engine without requests and documents."""
    life = state.life
    ledger = life.ledger
    left = [f"sequence {number} is {one.state.label}" for number, one in list(life.requests.items())]
    left += [f"the ledger has sequence {number}" for number in list(ledger.sequences)]
    left += [f"the ledger has a move of {move}" for move in list(ledger.moves)]
    left += [f"handle {number} of client {one.client}" for number, one in list(state.handles.items()) if number]
    accounts = dict(ledger.workers)
    left += [f"{worker} has {account.used} used blocks" for worker, account in accounts.items() if account.used]
    left += [f"{worker} has {size} bytes on its disk" for worker, size in life.disks.disk.used.items() if size]
    left += [f"{worker} has {size} bytes in host memory" for worker, size in life.disks.memory.used.items() if size]
    try:
        pools = client.run(_used_blocks, state.spec.engine)
    except Exception as error:  # a worker that has just died
        return [f"workers do not report what they hold: {error!r}"]
    for worker, account in accounts.items():
        if pools.get(worker) != account.cached:
            left.append(f"{worker} holds {pools.get(worker)} blocks, but the ledger has {account.cached} cached ones")
    return left


def _used_blocks(engine: str, dask_worker: Worker) -> int | None:
    plugin: Any = dask_worker.plugins["distkv"]
    engines = plugin.engines
    return int(engines[engine].runtime.pool.used_blocks) if engine in engines else None


def cluster_leaks(client: Client, scheduler: Scheduler, known: Iterable[str]) -> list[str]:
    """What is left on scheduler and workers after the last engine was closed.

    ``known`` are addresses of Dask's own servers: connections to them are not leaks.
    """
    manager: Any = scheduler.plugins["distkv"]
    left = [f"engine {name} is open" for name in manager.engines]
    left += [f"task {key}" for key in list(scheduler.tasks) if str(key).startswith(OURS)]
    left += [f"the submitter has task {key}" for key in list(manager.dispatcher.submitter._tasks)]
    try:
        workers = client.run(_left_on, frozenset(known))
    except Exception as error:
        return [f"workers do not report what they have: {error!r}"]
    return left + [f"{worker}: {what}" for worker, several in workers.items() for what in several]


def _left_on(known: frozenset[str], dask_worker: Worker) -> list[str]:
    """What the engine left behind; runs on a worker."""
    plugin: Any = dask_worker.plugins["distkv"]
    left = [f"engine {name} is open" for name in plugin.engines]
    left += [f"lanes {plugin.lanes}"] if plugin.lanes is not None else []
    left += [f"asyncio task {task}" for task in plugin._tasks]
    names = [thread.name for thread in threading.enumerate()]
    left += [f"thread {name}" for name in names if name.startswith("distkv")]
    busy = [name for name in names if name.startswith("Dask-Default-Threads")]
    left += [f"threads {busy}"] if len(busy) > 1 + dask_worker.state.nthreads else []
    left += [f"socket {one}" for one in _sockets(dask_worker.address, known)]
    files = Path(dask_worker.local_directory).glob("distkv-*/**/*")
    return left + [f"file {path}" for path in files if path.is_file()]


def _sockets(own: str, known: frozenset[str]) -> list[str]:
    """Sockets of this process that are neither Dask's nor a pair within it."""
    left = []
    for one in psutil.Process().net_connections("all"):
        if isinstance(one.laddr, str):  # a Unix socket
            left += [f"unix {one.laddr!r}"] if "distkv" in one.laddr else []
            continue
        scheme = own.partition("://")[0]
        here = f"{scheme}://{one.laddr.ip}:{one.laddr.port}" if one.laddr else ""
        there = f"{scheme}://{one.raddr.ip}:{one.raddr.port}" if one.raddr else ""
        dasks = here == own or here.startswith(f"{scheme}://0.0.0.0:")  # its HTTP server listens on all networks
        if not dasks and here not in known and there not in known:
            left.append(f"{one.status} {here} {there}")
    return left


def file_leaks(folder: Path) -> list[str]:
    """Unfinished files of saved documents, and spilled blocks of workers that have ended."""
    unfinished = [*folder.rglob("*.unfinished"), *folder.glob("scratch/**/distkv-*/*")]
    return [f"file {path}" for path in unfinished]


def own_leaks() -> list[str]:
    """What is left in this process after everything was closed."""
    left = [f"thread {one.name}" for one in threading.enumerate() if one.name.startswith("distkv")]
    inet = psutil.Process().net_connections("inet")
    return left + [f"socket of the client: {one.laddr} {one.raddr}" for one in inet if one.status != "CLOSE_WAIT"]


class Addresses:
    """Every address that a Dask server has had.

    Parameters
    ----------
    scheduler
        The scheduler, in this process.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.known = {scheduler.address}

    def look(self) -> None:
        """Add the current addresses."""
        for address, worker in dict(self._scheduler.workers).items():
            self.known |= {address, worker.nanny or address}


def running(scheduler: Scheduler) -> int:
    """Number of running workers."""
    return sum(worker.status == Status.running for worker in dict(scheduler.workers).values())
