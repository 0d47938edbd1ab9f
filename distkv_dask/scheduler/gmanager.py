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
from collections.abc import Callable, Iterable
from time import monotonic, process_time, thread_time
from typing import TYPE_CHECKING, Any

from distributed import SchedulerPlugin
from distributed.core import Status

from distkv_dask.errors import ClusterError, DistKVError, EngineClosedError, in_words, without_quotes
from distkv_dask.protocol import (
    MEMORY_RESOURCE,
    OWN_DISK,
    PLUGIN,
    TAKE_TRACE,
    WORKER_EVENT,
    ClientCall,
    DaskSpan,
    Delivery,
    FromWorker,
    ToWorker,
    pack,
    unpack,
)
from distkv_dask.scheduler import commands as do
from distkv_dask.scheduler.dashboard.board import Board
from distkv_dask.scheduler.engines.engine import EngineState
from distkv_dask.scheduler.tasks.lowering import lower, step_graph
from distkv_dask.scheduler.tasks.submitter import DRAIN_INTERVAL, Submitter
from distkv_dask.scheduler.work.pacing import Pacer
from distkv_dask.types import Endpoint, FinishReason
from distkv_dask.worker.rmanager import RManager

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler, WorkerState

logger = logging.getLogger("distributed.distkv.gmanager")

EXPIRE_INTERVAL = 1.0
TRACE_SECONDS = 2.0
"""Time that a worker has to hand out its spans; a frozen one must not keep those of the others."""


class GManager(SchedulerPlugin):
    """Scheduler plugin; ``client.register_plugin(GManager())`` is the only installation step.

    ``start`` installs the rManager on all workers, those that join later included. Engines come and go by the calls in
    :class:`~distkv_dask.protocol.ClientCall`.
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
        scheduler.stream_handlers[WORKER_EVENT] = self.worker_event
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

    async def open(self, spec: Any, client: str) -> dict[str, Any]:
        """Load an engine (a packed :class:`EngineSpec`) on all workers; returns facts, or raises what went wrong."""
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
                    if self._is_memory(worker) is memory and not engine.knows(worker):
                        self._open_on(worker, engine)
                await engine.wait_open(spec.config.timeout_open)
        except DistKVError:
            await self.close_engine(spec.engine)
            raise
        self.scheduler.log_event(PLUGIN, {"action": "open", "engine": spec.engine, "workers": len(engine.facts)})
        return engine.summary()

    async def attach(self, engine: str, client: str) -> Any:
        """Give a client a handle (packed :class:`Attached`) on an engine; ``""`` is the only one that is open."""
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
                self._run(state, state.lifecycle.stop(number, "cancelled", monotonic()))

    def _is_memory(self, worker: str) -> bool:
        state = self.scheduler.workers.get(worker)
        return state is not None and MEMORY_RESOURCE in state.resources

    def _open_on(self, worker: str, engine: EngineState) -> None:
        """Open an engine on a worker; on a memory worker only once the model's geometry is known."""
        geometry = engine.geometry if self._is_memory(worker) else None
        if geometry is not None or not self._is_memory(worker):
            engine.expect(worker)
            self._send(worker, ToWorker.OPEN, (engine.spec, geometry))

    def submit(self, engine: str, requests: Any) -> Any:
        """Take requests (packed :class:`Submission`); returns the refused ones with their reasons.

        All of them are in the queue before one is admitted: the policy says who is first, not their order here.
        """
        state = self._engine(engine)
        if state.is_closing:
            raise EngineClosedError(f"engine {engine} is closing")
        accepted: list[Iterable[do.Command]] = []
        refused: dict[int, Exception] = {}
        for one in unpack(requests):
            try:
                accepted.append(state.lifecycle.accept(one, monotonic()))
            except DistKVError as error:
                refused[one.number] = error
        for commands in accepted:
            self._run(state, commands)
        return pack(refused)

    def stop(self, engine: str, request: int, reason: FinishReason) -> None:
        """End a request for the client's reason; unknown and finished ones are ignored."""
        state = self._engine(engine)
        self._run(state, state.lifecycle.stop(request, reason, monotonic()))

    async def events(self, engine: str, handle: int, heard: int, wait: float) -> Any:
        """New tokens and ends but for the first ``heard``, waiting up to ``wait`` seconds for one (long poll)."""
        return pack(await self._engine(engine).take_events(handle, heard, wait))

    def status(self, engine: str) -> dict[str, Any]:
        """What ``Engine.status`` shows."""
        return self._engine(engine).status()

    def enter_span(self, engine: str, span: DaskSpan | None) -> None:
        """Let an engine's tasks belong to a Dask span from now on."""
        state = self._engine(engine)
        state.span = span and {"name": tuple(span["name"]), "ids": tuple(span["ids"])}

    def list_engines(self) -> dict[str, dict[str, Any]]:
        """The status of every engine, whoever opened it, by its id; with its model and its client's id."""
        return {
            name: {"model": state.spec.model, "dtype": state.spec.dtype, "client": state.client, **state.status()}
            for name, state in self.engines.items()
        }

    def graph(self, engine: str, tokens: int, granularity: str) -> Any:
        """The graph (packed) of a decode step of a sequence with room for ``tokens`` tokens, if it were placed now."""
        state = self._engine(engine)
        return pack(step_graph(state.lifecycle, tokens, granularity, state.layers))

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
        state.closing()
        self._run(state, state.lifecycle.stop_all(monotonic()))
        limit = state.spec.config.timeout_close
        await self.submitter.drained(engine, limit)  # so that what still runs ends by itself, not with errors
        for worker in state.open_on():
            self._send(worker, ToWorker.CLOSE, engine)
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

    # Events of workers

    def worker_event(self, worker: str, event: str, engine: str = "", payload: Any = None) -> None:
        """One message of an rManager (see :class:`~distkv_dask.protocol.FromWorker`)."""
        if event == FromWorker.HELLO:
            for state in self.engines.values():
                if not state.is_closing and not state.knows(worker):
                    self._open_on(worker, state)
            return
        if engine not in self.engines or worker not in self.scheduler.workers:
            return
        state = self.engines[engine]
        life, now = state.lifecycle, monotonic()
        payload = unpack(payload)
        match event:
            case FromWorker.READY:
                endpoint: Endpoint = payload["endpoint"]
                state.ready(worker, payload)
                can_decode = payload["role"] == "instance"
                capacity, disk = payload["capacity_blocks"], payload["spill_bytes"]
                self._run(state, life.worker_ready(endpoint, capacity, now, can_decode=can_decode, spill_bytes=disk))
            case FromWorker.OPEN_FAILED:
                logger.error("engine %s cannot open on %s: %s", engine, worker, payload)
                state.open_failed(worker, payload)
            case FromWorker.CLOSED if state.is_closing:
                state.closed(worker)
            case FromWorker.CLOSED:  # nobody asked for it: the worker is about to leave
                self._lose(state, worker, "closes")
            case FromWorker.LOST:
                self._engine_lost(state, worker, payload)
            case FromWorker.CHUNK_STARTED:
                life.chunk_started(payload)
            case FromWorker.CHUNK_DONE:
                sequence, gang, exchanged = payload
                state.prefilled(sequence, gang, exchanged)
                self._run(state, life.chunk_done(sequence, gang, now))
            case FromWorker.PREFILLED:
                sequence, gang, token, reason, exchanged = payload
                state.prefilled(sequence, gang, exchanged)
                self._run(state, life.prefilled(sequence, gang, token, reason, now))
            case FromWorker.WINDOW_STARTED:
                self._run(state, life.window_started(worker, payload))
            case FromWorker.WINDOW_DONE:
                number, epoch, result, used = payload
                self.submitter.hurry(worker)
                state.figures.window(worker, result)
                self._run(state, life.window_done(worker, number, epoch, result, used, now))
            case FromWorker.GANG_FAILED:
                gang, error = payload
                if isinstance(error, EngineClosedError) and life.is_under_way(gang) and not state.is_closing:
                    self._lose(state, worker, "closed the engine")
                else:
                    self._gang_failed(state, gang, error)
            case FromWorker.RETIRED:
                self._run(state, life.retired(payload, worker, now))
            case FromWorker.EXPECTED:
                number, refusal = payload
                self._run(state, life.move_expected(number, refusal, now))
            case FromWorker.SENT:
                number, failure = payload
                self._run(state, life.move_sent(number, failure, now))
            case FromWorker.STORED:
                number, files, error = payload
                self._run(state, life.saved(number, worker, files, error, now))
            case FromWorker.FETCHED:
                number, error = payload
                self._run(state, life.fetched(number, worker, error, now))
            case FromWorker.RELOCATED:
                self._run(state, life.relocated(payload, now))

    def remove_worker(self, scheduler: Scheduler, worker: str, **kwargs: Any) -> None:
        """Dask hook: a worker died or left."""
        for state in list(self.engines.values()):
            self._lose(state, worker, "died or left")
        self.submitter.worker_lost(worker)

    def _lose(self, state: EngineState, worker: str, how: str) -> None:
        """An engine lost a worker: what lay there is computed anew."""
        if worker in state.facts:
            state.figures.happened(monotonic(), "loss", f"worker {worker} {how}")
        state.worker_lost(worker)
        life = state.lifecycle
        before = {number: len(live.lost) for number, live in life.live.items()}
        self._run(state, life.worker_lost(worker, monotonic()))
        for number, live in life.live.items():
            if len(live.lost) > before.get(number, 0) and live.ended is None:
                text = f"request {number} lost blocks with {worker}: they are computed anew"
                state.figures.happened(monotonic(), "repair", text)
                logger.warning(text)

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
            drained = [one.lifecycle.is_drained for one in self.engines.values()]
            retired = await self.scheduler.retire_workers(
                workers=[worker for worker in workers if all(is_drained(worker) for is_drained in drained)],
                close_workers=close_workers,
                remove=remove,
                stimulus_id=stimulus_id,
            )
        finally:  # those that stay, for whatever reason, get work again
            for state in self.engines.values():
                for worker in set(workers) - set(retired):
                    self._run(state, state.lifecycle.drain(worker, False, monotonic()))
        return retired

    async def _drain(self, state: EngineState, workers: list[str]) -> None:
        """Move an engine's blocks away from workers; gives up after ``distkv.timeouts.drain``."""
        life, deadline = state.lifecycle, monotonic() + state.spec.config.timeout_drain
        for worker in workers:
            self._run(state, life.drain(worker, True, monotonic()))
        while not all(map(life.is_drained, workers)) and not state.is_closing and monotonic() < deadline:
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

    def _run(self, state: EngineState, commands: Iterable[do.Command]) -> None:
        """Enact what the lifecycle asks for. A fault in that ends the engine: half of a plan must not live on."""
        try:
            self._enact(state, commands)
        except DistKVError:
            raise
        except Exception as error:
            logger.exception("engine %s is broken and will be closed", state.spec.engine)
            state.fail(EngineClosedError(f"the engine is broken, see the scheduler's log: {in_words(error)}"))
            self._close_soon(state.spec.engine)

    def _enact(self, state: EngineState, commands: Iterable[do.Command]) -> None:
        for command in commands:
            match command:
                case do.Reserve(worker, sequence, start, stop):
                    self._send(worker, ToWorker.RESERVE, (state.spec.engine, sequence, start, stop))
                case do.Retire(worker, sequence):
                    self._send(worker, ToWorker.RETIRE, (state.spec.engine, sequence))
                case do.Release(worker, sequence):
                    self._send(worker, ToWorker.RELEASE, (state.spec.engine, sequence))
                case do.Join(home, sequence_state, holders):
                    self._send(home, ToWorker.JOIN, (state.spec.engine, sequence_state, holders))
                case do.Reset(home, epoch):
                    self._send(home, ToWorker.RESET, (state.spec.engine, epoch))
                case do.Expect(worker, number, sequence, start, stop):
                    self._send(worker, ToWorker.EXPECT, (state.spec.engine, number, sequence, start, stop))
                case do.Send(worker, number, sequence, start, stop, target, pace):
                    moved = f"tokens {start} to {stop} of sequence {sequence} from {worker} to {target}"
                    state.figures.happened(monotonic(), "move", moved)
                    payload = (state.spec.engine, number, sequence, start, stop, target, pace)
                    self._send(worker, ToWorker.SEND, payload)
                case do.Relocate(home, number, sequence, placement, holders):
                    self._send(home, ToWorker.RELOCATE, (state.spec.engine, number, sequence, placement, holders))
                case do.Free(worker, sequence, start, stop):
                    self._send(worker, ToWorker.FREE, (state.spec.engine, sequence, start, stop))
                case do.Store(worker, number, sequence, ranges, saved):
                    if saved.place == OWN_DISK:
                        state.figures.happened(
                            monotonic(),
                            "spill",
                            f"tokens {_words(ranges)} of sequence {sequence} to the disk of {worker}",
                        )
                    self._send(worker, ToWorker.STORE, (state.spec.engine, number, sequence, ranges, saved))
                case do.Fetch(worker, sequence, ranges, saved):
                    if saved.place == OWN_DISK:
                        state.figures.happened(
                            monotonic(),
                            "restore",
                            f"tokens {_words(ranges)} of sequence {sequence} from disk to {worker}",
                        )
                    self._send(worker, ToWorker.FETCH, (state.spec.engine, sequence, ranges, saved))
                case do.Discard(worker, names):
                    self._send(worker, ToWorker.DISCARD, (state.spec.engine, names))
                case do.Abort(worker, gang, reason, unused):
                    self._send(worker, ToWorker.ABORT, (state.spec.engine, gang, reason, unused))
                case do.SubmitWindow(patience=patience) if state.spec.config.granularity == "window":
                    self.submitter.submit(*lower(command, "window", state.layers), patience, state.span)
                case do.SubmitPrefill() | do.SubmitWindow() | do.AddHolders():
                    lowered = lower(command, state.spec.config.granularity, state.layers)
                    self.submitter.submit(*lowered, span=state.span)
                case do.Forget(gang, finished):
                    self.submitter.forget(gang, finished)
                case Delivery():
                    state.deliver(command)

    def _send(self, worker: str, call: ToWorker, payload: Any) -> None:
        if worker in self.scheduler.stream_comms:  # else it is gone, and remove_worker is about to be called
            self.scheduler.worker_send(worker, {"op": str(call), "payload": pack(payload)})

    def _gang_failed(self, state: EngineState, gang: int, error: Exception) -> None:
        told = without_quotes(error)
        self.scheduler.log_event(
            PLUGIN, {"action": "gang-failed", "engine": state.spec.engine, "gang": gang, "error": told}
        )
        state.figures.happened(monotonic(), "failure", told)
        self._run(state, state.lifecycle.gang_failed(gang, error, monotonic()))

    def _task_failed(self, engine: str, gang: int, error: Exception) -> None:
        """A task failed without its rManager telling: it could not be unpickled, was cancelled by somebody, ..."""
        if engine in self.engines:
            self._gang_failed(self.engines[engine], gang, error)

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
                self._run(engine, engine.lifecycle.pause(paused, monotonic()))
                self._run(engine, engine.lifecycle.expire(monotonic()))

    def _engine(self, engine: str) -> EngineState:
        try:
            return self.engines[engine]
        except KeyError:
            raise EngineClosedError(f"engine {engine} is closed") from None


def _words(ranges: Iterable[tuple[int, int]]) -> str:
    """Token ranges in words.

    Examples
    --------
    >>> _words([(0, 8), (12, 14)])
    '0 to 8, 12 to 14'
    """
    return ", ".join(f"{start} to {stop}" for start, stop in ranges)
