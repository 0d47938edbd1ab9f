"""The gManager: a Dask scheduler plugin that owns placement, admission and epochs of all engines of a cluster.

This module has only Dask's hooks and the calls of clients. Decisions are made by the pure
:class:`~distkv_dask.scheduler.lifecycle.machine.Lifecycle`, and carried out by :mod:`distkv_dask.scheduler.dispatch`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pickle
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from distributed import SchedulerPlugin

from distkv_dask.errors import ClusterError, DistKVError, EngineClosedError
from distkv_dask.messages.client_calls import ClientCall
from distkv_dask.messages.names import (
    FROM_WORKER,
    MEMORY_RESOURCE,
    PLUGIN,
    TAKE_TRACE,
    DaskSpan,
    pack,
    unpack,
)
from distkv_dask.messages.status import EngineSummary
from distkv_dask.sampling import FinishReason
from distkv_dask.scheduler import commands as do
from distkv_dask.scheduler.departures import retire
from distkv_dask.scheduler.dispatch import ONE_VERSION, Dispatcher
from distkv_dask.scheduler.engines.engine import EngineState
from distkv_dask.scheduler.engines.group import check_stages
from distkv_dask.scheduler.lifecycle.events import (
    Stop,
    Submit,
)
from distkv_dask.scheduler.tasks.lowering import step_graph
from distkv_dask.version import VERSION
from distkv_dask.worker.rmanager import RManager

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler, WorkerState

logger = logging.getLogger("distributed.distkv.gmanager")

TRACE_SECONDS = 2.0
"""Seconds that a worker has to return its spans; a frozen one must not delay those of others."""


class GManager(SchedulerPlugin):
    """Scheduler plugin; ``client.register_plugin(GManager())`` is the only installation step.

    ``start`` installs the rManager on all workers, those that join later included. Engines come and go by the calls in
    :class:`~distkv_dask.messages.client_calls.ClientCall`.
    """

    name = PLUGIN
    idempotent = True

    async def start(self, scheduler: Scheduler) -> None:
        """Register handlers, then the rManagers."""
        self.scheduler = scheduler
        self.started = asyncio.Event()
        owner = scheduler.extensions.setdefault(PLUGIN, self)
        if owner is not self:  # two engines are the first at the same time: Dask would start two gManagers
            await owner.started.wait()
            return
        self.dispatcher = Dispatcher(scheduler)
        self.engines: Mapping[str, EngineState] = self.dispatcher.engines
        self._handlers: dict[str, Callable[..., Any]] = {
            ClientCall.OPEN: self.open,
            ClientCall.ATTACH: self.attach,
            ClientCall.DETACH: self.detach,
            ClientCall.SUBMIT: self.submit,
            ClientCall.STOP: self.stop,
            ClientCall.EVENTS: self.events,
            ClientCall.STATUS: self.status,
            ClientCall.ENGINES: self.list_engines,
            ClientCall.GRAPH: self.graph,
            ClientCall.TRACE: self.trace,
            ClientCall.SPAN: self.enter_span,
            ClientCall.CLOSE: self.dispatcher.close_engine,
            "retire_workers": self.retire_workers,
        }
        scheduler.handlers.update(self._handlers)
        scheduler.stream_handlers[FROM_WORKER] = self.worker_event
        scheduler.set_metadata([PLUGIN], True)  # status commands ask this: Dask logs calls without a handler
        replies = await scheduler.register_worker_plugin(None, pickle.dumps(RManager()), name=PLUGIN, idempotent=False)
        failed = {worker: reply for worker, reply in replies.items() if reply["status"] != "OK"}
        self.started.set()
        if failed:
            await self._uninstall()
            raise ClusterError(f"the rManager failed to start on {sorted(failed)}; see the logs of these workers")

    async def close(self) -> None:
        """Scheduler shutdown."""
        await self.dispatcher.shut_down(EngineClosedError("the Dask scheduler shut down"))

    async def _uninstall(self) -> None:
        del self.scheduler.extensions[PLUGIN]
        self.scheduler.set_metadata([PLUGIN], False)
        for name in self._handlers:
            self.scheduler.handlers.pop(name, None)
        self.scheduler.handlers["retire_workers"] = self.scheduler.retire_workers
        await self.scheduler.unregister_worker_plugin(None, PLUGIN)

    # Calls of clients

    async def open(self, spec: Any, client: str, version: str = "") -> Any:
        """Load an engine (a packed :class:`EngineSpec`) on all workers; returns packed :class:`EngineFacts`."""
        _check_version(version)
        spec = unpack(spec)
        if all(map(self.dispatcher.is_memory, self.scheduler.workers)):
            raise ClusterError(
                "the cluster has no workers that may load a model: start some (cluster.scale(n)) or wait for them "
                f"(client.wait_for_workers(n)); those with the resource {MEMORY_RESOURCE} only hold KV"
            )
        if spec.config.stage_count > 1:
            check_stages(spec.config, [one for one in self.scheduler.workers if not self.dispatcher.is_memory(one)])
        engine = await self.dispatcher.add_engine(spec, client)
        try:
            for memory in (False, True):  # instances first: memory workers need the geometry of their model
                for worker in list(self.scheduler.stream_comms):
                    if self.dispatcher.is_memory(worker) is memory:
                        self.dispatcher.open_on(worker, engine)
                await engine.opening.wait_open(spec.config.timeout_open)
            engine.opening.finish()
            await self.dispatcher.survey.engine_opens(engine)
        except DistKVError:
            await self.dispatcher.close_engine(spec.engine)
            raise
        self.scheduler.log_event(PLUGIN, {"action": "open", "engine": spec.engine, "workers": len(engine.facts)})
        return pack(engine.summary())

    async def attach(self, engine: str, client: str, version: str = "") -> Any:
        """Give a client a handle (packed :class:`Attached`) on an engine; ``""`` names the only open one."""
        _check_version(version)
        if not engine:
            names = [name for name, state in self.engines.items() if not state.is_closing]
            if not names:
                raise ClusterError("no engine is open on this cluster: open one with Engine(client, model=...)")
            if len(names) > 1:
                raise ClusterError(f"several engines are open ({', '.join(names)}): say which one")
            (engine,) = names
        state = self._engine(engine)
        await state.wait_usable(state.spec.config.timeout_open)
        if client not in self.scheduler.clients:
            raise EngineClosedError(f"client {client} left while it waited for engine {engine}")
        return pack(state.attach(client))

    def detach(self, engine: str, handle: int) -> None:
        """Remove a handle: its requests end, its documents are released."""
        if (state := self.engines.get(engine)) is not None and not state.is_closing:
            for number in state.detach(handle):
                self.dispatcher.handle(state, Stop(number, "cancelled"))

    def submit(self, engine: str, requests: Any) -> Any:
        """Take requests (packed :class:`Submission`); returns the refused ones with their reasons.

        All of them are queued before the first is admitted, so that the policy decides their order.
        """
        state = self._engine(engine)
        if state.is_closing:
            raise EngineClosedError(f"engine {engine} is closing")
        commands = self.dispatcher.handle(state, Submit(tuple(unpack(requests))))
        if state.broken is not None:
            raise state.broken
        return pack({one.sequence: one.error for one in commands if isinstance(one, do.Refuse)})

    def stop(self, engine: str, request: int, reason: FinishReason) -> None:
        """End a request for the client's reason; unknown and finished ones are ignored."""
        state = self._engine(engine)
        self.dispatcher.handle(state, Stop(request, reason))

    async def events(self, engine: str, handle: int, heard: int, wait: float) -> Any:
        """Tokens and ends after the first ``heard``, waiting up to ``wait`` seconds for one (long poll).

        A handle that was just given back may have a poll on its way. Dask logs what a call raises, so this returns the
        error.
        """
        try:
            return pack(await self._engine(engine).take_events(handle, heard, wait))
        except EngineClosedError as error:
            return pack(EngineClosedError(str(error)))

    def status(self, engine: str) -> Any:
        """The engine's status (packed)."""
        return pack(self._engine(engine).status())

    def enter_span(self, engine: str, span: DaskSpan | None) -> None:
        """Put an engine's tasks into a Dask span from now on."""
        state = self._engine(engine)
        state.span = span and {"name": tuple(span["name"]), "ids": tuple(span["ids"])}

    def list_engines(self, version: str = "") -> Any:
        """All engines, of all clients, by id (packed); a client of another version could not read it."""
        _check_version(version)
        return pack(
            {
                name: EngineSummary(state.spec.model, state.spec.dtype, state.client, state.status())
                for name, state in self.engines.items()
            }
        )

    def graph(self, engine: str, tokens: int, granularity: str) -> Any:
        """The graph (packed) of a decode step of a sequence with room for ``tokens`` tokens, if it were placed now."""
        state = self._engine(engine)
        return pack(step_graph(state.life, tokens, granularity, state.layers))

    async def trace(self, engine: str) -> Any:
        """Spans of every worker's lanes since the last call (packed); workers that do not answer are left out."""
        workers = list(self._engine(engine).facts)
        answers = await asyncio.gather(*(self._take_trace(worker, engine) for worker in workers))
        return pack({worker: answer for worker, answer in zip(workers, answers, strict=True) if answer})

    async def _take_trace(self, worker: str, engine: str) -> Any:
        with contextlib.suppress(OSError, TimeoutError):
            call = getattr(self.scheduler.rpc(worker), TAKE_TRACE)
            return unpack(await asyncio.wait_for(call(engine=engine), TRACE_SECONDS))
        return None

    # Messages of workers

    def worker_event(self, worker: str, version: str, engine: str = "", message: Any = None) -> None:
        """One message of an rManager (a packed :class:`~distkv_dask.messages.from_worker.FromWorker`).

        Without a message, it announces the worker and its version of this package.
        """
        if message is None:
            self.dispatcher.worker_came(worker, version)
        elif engine in self.engines and worker in self.scheduler.workers:
            self.dispatcher.take_message(self.engines[engine], unpack(message))

    def remove_worker(self, scheduler: Scheduler, worker: str, **kwargs: Any) -> None:
        """Dask hook: a worker died or left."""
        self.dispatcher.worker_left(worker)

    def valid_workers_downscaling(self, scheduler: Scheduler, workers: list[WorkerState]) -> list[WorkerState]:
        """Dask hook: workers that an engine needs now are not removed by scaling down."""
        needed = {worker for state in self.engines.values() for worker in state.needs()}
        return [worker for worker in workers if worker.address not in needed]

    async def retire_workers(
        self,
        workers: list[str] | None = None,
        names: list[Any] | None = None,
        close_workers: bool = False,
        remove: bool = True,
        stimulus_id: str | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Dask's call, but blocks are moved away first; workers that keep some are not retired."""
        if workers is None and names is None:
            workers = self.scheduler.workers_to_close(**kwargs)
        elif workers is None:
            wanted = set(map(str, names or ()))
            workers = [worker for worker, state in self.scheduler.workers.items() if str(state.name) in wanted]
        options = {"close_workers": close_workers, "remove": remove, "stimulus_id": stimulus_id}
        return await retire(self.dispatcher, workers, options)

    def remove_client(self, scheduler: Scheduler, client: str) -> None:
        """Dask hook: a client died or left; its engines, and its handles on others, go with it."""
        for name, state in list(self.engines.items()):
            if state.client == client and not state.is_closing:
                logger.info("client %s is gone: closing its engine %s", client, name)
                self.dispatcher.close_soon(name)
            else:
                for handle in state.handles_of(client):
                    self.detach(name, handle)

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        """Dask hook: lets the submitter forget finished tasks and see those that failed outside our code."""
        self.dispatcher.submitter.transition(key, finish)

    def _engine(self, engine: str) -> EngineState:
        try:
            return self.engines[engine]
        except KeyError:
            raise EngineClosedError(f"engine {engine} is closed") from None


def _check_version(version: str) -> None:
    """Refuse a client that runs another version of the package."""
    if version != VERSION:
        text = f"this client runs distkv-dask {version or 'of an older version'}, the scheduler {VERSION}"
        raise ClusterError(f"{text}: {ONE_VERSION}")
