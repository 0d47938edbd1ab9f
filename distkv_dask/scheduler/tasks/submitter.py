"""Submits step graphs from within the scheduler process, and lets Dask forget them when they are done.

The gManager has its own Dask client, connected to its own scheduler, that submits the graphs. So only public interfaces
are used, and the cadence of windows does not depend on a user's client, which may be far away or busy. Windows that are
not urgent are collected, since a graph costs the scheduler as much as the tasks of several windows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from time import monotonic
from typing import TYPE_CHECKING, Any

from distributed import Client, Future, Security

from distkv_dask.errors import ClusterError, GangAbortedError, in_words
from distkv_dask.gang import Gang
from distkv_dask.graphs.build import StepGraph, gang_keys
from distkv_dask.messages.names import DaskSpan

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler

DRAIN_INTERVAL = 0.02
"""Seconds between checks whether an engine's last tasks have ended."""

PRIORITY = 100
"""Tasks of a gang go before a user's other tasks: members that started wait for those that did not."""


@dataclass(slots=True)
class _Task:
    future: Future[Any]
    worker: str
    engine: str
    gang: int
    is_done_with: bool = False


class Submitter:
    """Tasks of all live gangs.

    Parameters
    ----------
    scheduler
        The scheduler this process runs.
    failed
        Called with (engine, gang number, error) when a task fails that was not dropped.
    """

    def __init__(self, scheduler: Scheduler, failed: Callable[[str, int, Exception], None]) -> None:
        self._scheduler = scheduler
        self._failed = failed
        self._client: Client | None = None
        self._opening = asyncio.Lock()
        self._tasks: dict[str, _Task] = {}
        self._gathered: list[tuple[StepGraph, list[Gang], DaskSpan | None]] = []
        self._flushing: asyncio.TimerHandle | None = None
        self._is_open = self._is_due = False
        self.ended = (0, 0)
        """Tasks that have finished: of gangs, and all others of the cluster."""

    async def open(self) -> None:
        """Connect, once.

        Raises
        ------
        ClusterError
            The scheduler cannot be reached from itself.
        """
        async with self._opening:
            if self._client is not None:
                return
            try:
                self._client = await Client(
                    self._scheduler.address,
                    asynchronous=True,
                    set_as_default=False,
                    name="distkv-gmanager",
                    security=_as_client(self._scheduler.security),
                )
            except (OSError, TypeError, ValueError) as error:
                raise ClusterError(f"the gManager cannot connect to its own scheduler: {in_words(error)}") from error

    async def close(self) -> None:
        """Cancel what is left and disconnect."""
        client, self._client = self._client, None
        self._disarm()
        self._gathered.clear()
        self._forget_keys(list(self._tasks), finished=False)
        if client is not None:
            await client.close()

    def submit(
        self, graph: StepGraph, gangs: Iterable[Gang], patience: float = 0.0, span: DaskSpan | None = None
    ) -> None:
        """Send a graph to the scheduler, in ``patience`` seconds at the latest and after those submitted before.

        Dask itself forgets the results of tasks that belong to no gang. ``span`` is the Dask span of all its tasks.
        """
        self._gathered.append((graph, list(gangs), span))
        if not patience and self._is_open:
            self._is_due = True
        elif not patience:
            self.flush()
        elif self._flushing is None or self._flushing.when() > asyncio.get_running_loop().time() + patience:
            self._disarm()
            self._flushing = asyncio.get_running_loop().call_later(patience, self.flush)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Send everything submitted inside a ``with`` statement as one graph at its end."""
        self._is_open, self._is_due = True, False
        try:
            yield
        finally:
            self._is_open = False
            if self._is_due:
                self.flush()

    def hurry(self, home: str) -> None:
        """Send collected windows, if a home waits for one of them."""
        if any(gang.home == home for _, gangs, _ in self._gathered for gang in gangs):
            self.flush()

    def flush(self) -> None:
        """Send collected windows."""
        self._disarm()
        gathered, self._gathered = self._gathered, []
        for span, several in groupby(gathered, key=lambda one: one[2]):
            graph, owners = StepGraph(), dict[str, Gang]()
            for one, gangs, _ in several:
                graph.tasks.update(one.tasks)
                graph.workers.update(one.workers)
                owners |= {key: gang for gang in gangs for key in gang_keys(gang)}
            self._send(graph, owners, span)

    def _send(self, graph: StepGraph, owners: Mapping[str, Gang], span: DaskSpan | None) -> None:
        assert self._client is not None
        keys = [key for key in graph.tasks if key in owners]
        futures = self._client.get(graph.highlevel(PRIORITY, span), keys, sync=False)
        for key, future in zip(keys, futures, strict=True):
            self._tasks[key] = _Task(future, graph.workers[key], owners[key].engine, owners[key].number)

    def _disarm(self) -> None:
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None

    def forget_tasks(self, gang: Gang, finished: bool) -> None:
        """Drop a gang's tasks: each when it has finished, or at once."""
        self._gathered = [one for one in self._gathered if gang.number not in {member.number for member in one[1]}]
        self._forget_keys(gang_keys(gang), finished)

    def _forget_keys(self, keys: Iterable[str], finished: bool) -> None:
        for key in keys:
            task = self._tasks.get(key)
            if task is None:
                continue
            task.is_done_with = True
            state = self._scheduler.tasks.get(key)  # the future learns of it later
            if not finished or (state is not None and state.state in ("memory", "erred")):
                self._drop(key)

    def worker_lost(self, worker: str, engine: str | None = None) -> None:
        """Drop the tasks of a lost worker, or only those of one engine that it lost."""
        lost = [key for key, task in self._tasks.items() if task.worker == worker and engine in (None, task.engine)]
        self._forget_keys(lost, finished=False)

    def cancel(self, engine: str) -> None:
        """Drop all tasks of an engine."""
        self.flush()
        self._forget_keys([key for key, task in self._tasks.items() if task.engine == engine], finished=False)

    async def drained(self, engine: str, limit: float) -> None:
        """Wait until no task of an engine is left, for at most ``limit`` seconds."""
        self.flush()
        deadline = monotonic() + limit
        while monotonic() < deadline and any(task.engine == engine for task in self._tasks.values()):
            await asyncio.sleep(DRAIN_INTERVAL)

    def transition(self, key: Any, finish: str) -> None:
        """A task of the cluster, perhaps ours, changed its state."""
        task = self._tasks.get(key)
        if finish == "memory":
            ours, others = self.ended
            self.ended = (ours + 1, others) if task is not None else (ours, others + 1)
        if task is None:
            return
        if finish == "memory" and task.is_done_with:
            self._drop(key)
        elif finish in ("forgotten", "erred") and task.worker not in self._scheduler.workers:
            self._drop(key)  # its worker is gone: the gManager learns of that next, and handles the whole gang
        elif finish == "forgotten" and not task.is_done_with:
            self._drop(key)
            self._failed(task.engine, task.gang, GangAbortedError(f"task {key} was cancelled by somebody else"))
        elif finish == "erred":
            state = self._scheduler.tasks[key]
            cause = state.exception_blame or state
            self._drop(key)
            if not task.is_done_with:
                self._failed(task.engine, task.gang, GangAbortedError(f"task {key} failed: {cause.exception_text}"))

    def _drop(self, key: str) -> None:
        self._tasks.pop(key).future.release()


def _as_client(security: Any) -> Any:
    """Credentials (Dask's ``Security``) of a client in the scheduler's process: for clients, else the scheduler's."""
    if security.tls_client_cert or not security.tls_scheduler_cert:
        return security
    return Security(
        require_encryption=security.require_encryption,
        tls_ca_file=security.tls_ca_file,
        tls_client_cert=security.tls_scheduler_cert,
        tls_client_key=security.tls_scheduler_key,
    )
