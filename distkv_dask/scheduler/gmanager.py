"""The gManager: a Dask scheduler plugin that owns placement, admission and epochs of all engines of a cluster.

It only moves messages. What to do is decided by the pure :class:`~distkv_dask.scheduler.lifecycle.machine.Lifecycle`;
the commands that come out are sent to rManagers over Dask's scheduler-to-worker stream, or submitted as step graphs
through a Dask client that lives in the scheduler process (:mod:`distkv_dask.scheduler.tasks.submitter`). Messages to a
worker and tasks on it travel in order, so a task never runs before the blocks it needs are reserved.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import pickle
import threading
from collections.abc import Callable
from time import monotonic, process_time, thread_time
from typing import TYPE_CHECKING, Any

from distributed import SchedulerPlugin
from distributed.core import Status

from distkv_dask.errors import ClusterError, DistKVError, EngineClosedError, in_words, without_quotes
from distkv_dask.messages import from_worker as did
from distkv_dask.messages.client_calls import ClientCall, Delivery
from distkv_dask.messages.names import (
    FROM_WORKER,
    MEMORY_RESOURCE,
    PLUGIN,
    TAKE_TRACE,
    TO_WORKER,
    DaskSpan,
    pack,
    unpack,
)
from distkv_dask.messages.status import EngineSummary
from distkv_dask.messages.to_worker import Close, Open, ToWorker
from distkv_dask.sampling import FinishReason
from distkv_dask.scheduler import commands as do
from distkv_dask.scheduler.costs.pacer import Pacer
from distkv_dask.scheduler.dashboard.board import Board
from distkv_dask.scheduler.engines.engine import EngineState
from distkv_dask.scheduler.lifecycle.events import (
    Drain,
    Event,
    Pause,
    Stop,
    StopAll,
    Submit,
    Tick,
    WorkerLost,
    WorkerReady,
)
from distkv_dask.scheduler.tasks.lowering import lower, step_graph
from distkv_dask.scheduler.tasks.submitter import DRAIN_INTERVAL, Submitter
from distkv_dask.version import VERSION
from distkv_dask.worker.rmanager import RManager

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler, WorkerState

logger = logging.getLogger("distributed.distkv.gmanager")

EXPIRE_INTERVAL = 1.0
ONE_VERSION = "install the same version for clients, scheduler and workers, and restart them"
TRACE_SECONDS = 2.0
"""Time that a worker has to hand out its spans; a frozen one must not keep those of the others."""


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
        self.versions: dict[str, str] = {}
        owner = scheduler.extensions.setdefault(PLUGIN, self)
        if owner is not self:  # two engines are the first at the same time: Dask would start two gManagers
            await owner.started.wait()
            return
        self.engines: dict[str, EngineState] = {}
        self.board = Board(scheduler, self.engines)
        self.submitter = Submitter(scheduler, self._task_failed)
        self.pacer = Pacer()
        self._gang_numbers = itertools.count(1)
        self._expiry: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()
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
            ClientCall.CLOSE: self.close_engine,
            "retire_workers": self.retire_workers,
        }
        scheduler.handlers.update(self._handlers)
        scheduler.stream_handlers[FROM_WORKER] = self.worker_event
        scheduler.set_metadata([PLUGIN], True)  # who only looks asks this first: Dask logs calls that nobody handles
        replies = await scheduler.register_worker_plugin(None, pickle.dumps(RManager()), name=PLUGIN, idempotent=False)
        failed = {worker: reply for worker, reply in replies.items() if reply["status"] != "OK"}
        self.started.set()
        if failed:
            await self._uninstall()
            raise ClusterError(f"the rManager failed to start on {sorted(failed)}; see the logs of these workers")

    async def close(self) -> None:
        """Scheduler shutdown."""
        if self._expiry is not None:
            self._expiry.cancel()
        self.board.stop()
        for engine in self.engines.values():
            engine.fail(EngineClosedError("the Dask scheduler shut down"))
        await self.submitter.close()

    async def _uninstall(self) -> None:
        del self.scheduler.extensions[PLUGIN]
        self.scheduler.set_metadata([PLUGIN], False)
        for name in self._handlers:
            self.scheduler.handlers.pop(name, None)
        self.scheduler.handlers["retire_workers"] = self.scheduler.retire_workers
        await self.scheduler.unregister_worker_plugin(None, PLUGIN)

    # Calls of clients

    async def open(self, spec: Any, client: str, version: str = "") -> dict[str, Any]:
        """Load an engine (a packed :class:`EngineSpec`) on all workers; returns facts, or raises what went wrong."""
        _check_version(version)
        spec = unpack(spec)
        if all(map(self._is_memory, self.scheduler.workers)):
            raise ClusterError(
                "the cluster has no workers that may load a model: start some (cluster.scale(n)) or wait for them "
                f"(client.wait_for_workers(n)); those with the resource {MEMORY_RESOURCE} only hold KV"
            )
        await self.submitter.open()
        engine = EngineState(spec, client, self._gang_numbers, self.pacer)
        self.engines[spec.engine] = engine
        self.board.start()
        if self._expiry is None:
            self._expiry = asyncio.create_task(self._expire())
        try:
            for memory in (False, True):  # instances first: they know what memory workers have to be told
                for worker in list(self.scheduler.stream_comms):
                    if self._is_memory(worker) is memory:
                        self._open_on(worker, engine)
                await engine.wait_open(spec.config.timeout_open)
        except DistKVError:
            await self.close_engine(spec.engine)
            raise
        self.scheduler.log_event(PLUGIN, {"action": "open", "engine": spec.engine, "workers": len(engine.facts)})
        return engine.summary()

    async def attach(self, engine: str, client: str, version: str = "") -> Any:
        """Give a client a handle (packed :class:`Attached`) on an engine; ``""`` is the only one that is open."""
        _check_version(version)
        if not engine:
            names = [name for name, state in self.engines.items() if not state.is_closing]
            if not names:
                raise ClusterError("no engine is open on this cluster: open one with Engine(client, model=...)")
            if len(names) > 1:
                raise ClusterError(f"several engines are open ({', '.join(names)}): say which one")
            (engine,) = names
        state = self._engine(engine)
        if not state.facts:
            await state.wait_open(state.spec.config.timeout_open)
        if state.is_closing:
            raise EngineClosedError(f"engine {engine} is closing")
        return pack(state.attach(client))

    def detach(self, engine: str, handle: int) -> None:
        """Take a handle back: its requests end, its documents are released."""
        if (state := self.engines.get(engine)) is not None and not state.is_closing:
            for number in state.detach(handle):
                self._handle(state, Stop(number, "cancelled"))

    def _is_memory(self, worker: str) -> bool:
        state = self.scheduler.workers.get(worker)
        return state is not None and MEMORY_RESOURCE in state.resources

    def _open_on(self, worker: str, engine: EngineState) -> None:
        """Open an engine on a worker, once its version is known, and on a memory worker the model's geometry."""
        geometry = engine.geometry if self._is_memory(worker) else None
        if engine.knows(worker) or (geometry is None and self._is_memory(worker)):
            return
        if (version := self.versions.get(worker)) is None:
            engine.await_hello(worker)
            return
        engine.expect(worker)
        if version == VERSION:
            self._send(engine, Open(worker, engine.spec, geometry))
        else:
            text = f"worker {worker} runs distkv-dask {version}, the scheduler {VERSION}"
            engine.open_failed(worker, ClusterError(f"{text}: {ONE_VERSION}"))

    def submit(self, engine: str, requests: Any) -> Any:
        """Take requests (packed :class:`Submission`); returns the refused ones with their reasons.

        All of them are in the queue before one is admitted: the policy says who is first, not their order here.
        """
        state = self._engine(engine)
        if state.is_closing:
            raise EngineClosedError(f"engine {engine} is closing")
        commands = self._handle(state, Submit(tuple(unpack(requests))))
        if state.broken is not None:
            raise state.broken
        return pack({one.sequence: one.error for one in commands if isinstance(one, do.Refuse)})

    def stop(self, engine: str, request: int, reason: FinishReason) -> None:
        """End a request for the client's reason; unknown and finished ones are ignored."""
        state = self._engine(engine)
        self._handle(state, Stop(request, reason))

    async def events(self, engine: str, handle: int, heard: int, wait: float) -> Any:
        """New tokens and ends but for the first ``heard``, waiting up to ``wait`` seconds for one (long poll)."""
        return pack(await self._engine(engine).take_events(handle, heard, wait))

    def status(self, engine: str) -> Any:
        """The engine's status (packed)."""
        return pack(self._engine(engine).status())

    def enter_span(self, engine: str, span: DaskSpan | None) -> None:
        """Let an engine's tasks belong to a Dask span from now on."""
        state = self._engine(engine)
        state.span = span and {"name": tuple(span["name"]), "ids": tuple(span["ids"])}

    def list_engines(self, version: str = "") -> Any:
        """Every engine, whoever opened it, by its id (packed); a client of another version could not read it."""
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
        """What every worker's lanes recorded since the last call (packed); those that do not answer are left out."""
        workers = list(self._engine(engine).facts)
        answers = await asyncio.gather(*(self._take_trace(worker, engine) for worker in workers))
        return pack({worker: answer for worker, answer in zip(workers, answers, strict=True) if answer})

    async def _take_trace(self, worker: str, engine: str) -> Any:
        with contextlib.suppress(OSError, TimeoutError):
            call = getattr(self.scheduler.rpc(worker), TAKE_TRACE)
            return unpack(await asyncio.wait_for(call(engine=engine), TRACE_SECONDS))
        return None

    async def close_engine(self, engine: str) -> None:
        """End all requests of an engine and free what it has on every worker; waits for the workers' answers."""
        state = self.engines.get(engine)
        if state is None:
            return
        if state.is_closing:
            return
        state.start_closing()
        self._handle(state, StopAll())
        limit = state.spec.config.timeout_close
        if state.broken is None:
            await self.submitter.drained(engine, limit)  # so that what still runs ends by itself, not with errors
        else:
            self.submitter.cancel(engine)  # nobody ends it
        for worker in state.open_on():
            self._send(state, Close(worker))
        await state.wait_closed(limit)
        self.pacer.rounds.pop(engine, None)
        self.board.past.absorb(self.engines.pop(engine).figures)
        if not self.engines:
            self.board.stop()
            if self._expiry is not None:
                self._expiry.cancel()
                self._expiry = None
            await self.submitter.close()
        self.scheduler.log_event(PLUGIN, {"action": "close", "engine": engine})

    # Messages of workers

    def worker_event(self, worker: str, version: str, engine: str = "", message: Any = None) -> None:
        """One message of an rManager (a packed :class:`~distkv_dask.messages.from_worker.FromWorker`).

        One without a message says that the worker is there, and which version of this package it runs.
        """
        if message is None:
            self.versions[worker] = version
            for state in self.engines.values():
                if not state.is_closing:
                    self._open_on(worker, state)
        elif engine in self.engines and worker in self.scheduler.workers:
            self._take(self.engines[engine], unpack(message))

    def _take(self, state: EngineState, message: did.FromWorker) -> None:
        match message:
            case did.Opened():
                state.ready(message)
                can_decode = message.role == "instance"
                ready = WorkerReady(message.endpoint, message.capacity_blocks, can_decode, message.spill_bytes)
                self._handle(state, ready)
            case did.OpenFailed(worker, error):
                logger.error("engine %s cannot open on %s: %s", state.spec.engine, worker, error)
                state.open_failed(worker, error)
            case did.Closed(worker) if state.is_closing:
                state.closed(worker)
            case did.Closed(worker):  # nobody asked for it: the worker is about to leave
                self._lose(state, worker, "closes")
            case did.Lost(worker, reason):
                self._engine_lost(state, worker, reason)
            case did.GangFailed(worker, gang, EngineClosedError()) if state.waits_for(gang):
                self._lose(state, worker, "closed the engine")
            case did.GangFailed():
                self._gang_failed(state, message)
            case did.ChunkDone() | did.Prefilled():
                state.prefilled(message)
                self._handle(state, message)
            case did.WindowDone():
                self.submitter.hurry(message.worker)
                state.figures.window(message.worker, message.result)
                self._handle(state, message)
            case _:
                self._handle(state, message)

    def remove_worker(self, scheduler: Scheduler, worker: str, **kwargs: Any) -> None:
        """Dask hook: a worker died or left."""
        self.versions.pop(worker, None)
        for state in list(self.engines.values()):
            self._lose(state, worker, "died or left")
        self.submitter.worker_lost(worker)

    def _lose(self, state: EngineState, worker: str, how: str) -> None:
        """An engine lost a worker: what lay there is recomputed."""
        if worker in state.facts:
            state.figures.happened(monotonic(), "loss", f"worker {worker} {how}")
        state.worker_lost(worker)
        self._handle(state, WorkerLost(worker))

    def _engine_lost(self, state: EngineState, worker: str, reason: str) -> None:
        """A worker lives, but lost all it had of an engine, since ``reason``: it opens the engine again."""
        if state.is_closing:
            return
        logger.error("engine %s was lost on %s: %s", state.spec.engine, worker, reason)
        self._lose(state, worker, f"lost the engine: {reason}")
        self.submitter.worker_lost(worker, state.spec.engine)
        if state.may_open_again(worker):
            self._open_on(worker, state)

    def valid_workers_downscaling(self, scheduler: Scheduler, workers: list[WorkerState]) -> list[WorkerState]:
        """Dask hook: workers that an engine needs just now are not taken away by scaling down."""
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
        """Dask's call of that name, but blocks are moved away first; workers that keep some are not retired."""
        if workers is None and names is None:
            workers = self.scheduler.workers_to_close(**kwargs)
        elif workers is None:
            wanted = set(map(str, names or ()))
            workers = [worker for worker, state in self.scheduler.workers.items() if str(state.name) in wanted]
        retired: dict[str, Any] = {}
        try:
            await asyncio.gather(*(self._drain(state, workers) for state in list(self.engines.values())))
            drained = [one.is_drained for one in self.engines.values()]
            retired = await self.scheduler.retire_workers(
                workers=[worker for worker in workers if all(is_drained(worker) for is_drained in drained)],
                close_workers=close_workers,
                remove=remove,
                stimulus_id=stimulus_id,
            )
        finally:  # those that stay, for whatever reason, get work again
            for state in self.engines.values():
                for worker in set(workers) - set(retired):
                    self._handle(state, Drain(worker, False))
        return retired

    async def _drain(self, state: EngineState, workers: list[str]) -> None:
        """Move an engine's blocks away from workers; gives up after ``distkv.timeouts.drain``."""
        deadline = monotonic() + state.spec.config.timeout_drain
        for worker in workers:
            self._handle(state, Drain(worker, True))
        while not all(map(state.is_drained, workers)) and not state.is_closing and monotonic() < deadline:
            await asyncio.sleep(DRAIN_INTERVAL)

    def remove_client(self, scheduler: Scheduler, client: str) -> None:
        """Dask hook: a client died or left; its engines, and its handles on others, go with it."""
        for name, state in list(self.engines.items()):
            if state.client == client and not state.is_closing:
                logger.info("client %s is gone: closing its engine %s", client, name)
                self._close_soon(name)
            else:
                for handle in state.handles_of(client):
                    self.detach(name, handle)

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        """Dask hook: lets the submitter forget finished tasks and see those that failed outside our code."""
        self.submitter.transition(key, finish)

    def _close_soon(self, engine: str) -> None:
        task = asyncio.create_task(self.close_engine(engine))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    # Commands

    def _handle(self, state: EngineState, event: Event) -> list[do.Command]:
        """Let an engine's state machine see to an event, and do what it asks for.

        A fault in that ends the engine: half of a plan must not live on, and nothing goes through the machine any more.
        """
        if state.broken is not None:
            return []
        try:
            commands = state.machine.handle(event, monotonic())
            for command in commands:
                self._enact(state, command)
            return commands
        except Exception as error:
            logger.exception("engine %s is broken and will be closed", state.spec.engine)
            state.broken = EngineClosedError(f"the engine is broken, see the scheduler's log: {in_words(error)}")
            state.fail(state.broken)
            self._close_soon(state.spec.engine)
            return []

    def _enact(self, state: EngineState, command: do.Command) -> None:
        match command:
            case ToWorker():
                self._send(state, command)
            case do.SubmitWindow(patience=patience) if state.spec.config.granularity == "window":
                self.submitter.submit(*lower(command, "window", state.layers), patience, state.span)
            case do.SubmitPrefill() | do.SubmitWindow() | do.AddHolders():
                lowered = lower(command, state.spec.config.granularity, state.layers)
                self.submitter.submit(*lowered, span=state.span)
            case do.ForgetTasks(gang, finished):
                self.submitter.forget_tasks(gang, finished)
            case do.Note(kind, text):
                state.figures.happened(monotonic(), kind, text)
                if kind == "repair":
                    logger.warning(text)
            case Delivery():
                state.deliver(command)

    def _send(self, state: EngineState, message: ToWorker) -> None:
        if message.worker in self.scheduler.stream_comms:  # else it is gone, and remove_worker is about to be called
            packed = {"op": TO_WORKER, "engine": state.spec.engine, "message": pack(message)}
            self.scheduler.worker_send(message.worker, packed)

    def _gang_failed(self, state: EngineState, failed: did.GangFailed) -> None:
        told = without_quotes(failed.error)
        self.scheduler.log_event(
            PLUGIN, {"action": "gang-failed", "engine": state.spec.engine, "gang": failed.gang, "error": told}
        )
        state.figures.happened(monotonic(), "failure", told)
        self._handle(state, failed)

    def _task_failed(self, engine: str, gang: int, error: Exception) -> None:
        """A task failed without its rManager telling: it could not be unpickled, was cancelled by somebody, ..."""
        if engine in self.engines:
            self._gang_failed(self.engines[engine], did.GangFailed("", gang, error))

    async def _expire(self) -> None:
        # a scheduler with a process of its own has its loop in the main thread; other threads are a user's elsewhere
        clock = process_time if threading.current_thread() is threading.main_thread() else thread_time
        while True:
            began, cpu, counted = monotonic(), clock(), self.submitter.ended
            await asyncio.sleep(EXPIRE_INTERVAL)
            tasks, others = (after - before for after, before in zip(self.submitter.ended, counted, strict=True))
            self.pacer.measured(monotonic() - began, clock() - cpu, tasks, others)
            paused = {worker for worker, state in self.scheduler.workers.items() if state.status == Status.paused}
            for engine in list(self.engines.values()):
                if (known := paused & engine.life.ledger.workers.keys()) != engine.life.paused:
                    self._handle(engine, Pause(frozenset(known)))
                self._handle(engine, Tick())

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
