"""Dispatch: passes events to the state machines of all engines, and carries out their commands.

Messages to workers travel on Dask's stream, tasks as step graphs through a Dask client in the scheduler process
(:mod:`distkv_dask.scheduler.tasks.submitter`), both in order: a task never runs before its blocks are reserved.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from time import monotonic
from typing import TYPE_CHECKING

from distributed.core import Status

from distkv_dask.errors import ClusterError, EngineClosedError, in_words, without_quotes
from distkv_dask.messages import from_worker as did
from distkv_dask.messages.names import MEMORY_RESOURCE, PLUGIN, TO_WORKER, EngineSpec, pack
from distkv_dask.messages.to_worker import Close, Open, ToWorker
from distkv_dask.scheduler import commands as do
from distkv_dask.scheduler.clock import run_clock
from distkv_dask.scheduler.costs.pacer import Pacer
from distkv_dask.scheduler.dashboard.board import Board
from distkv_dask.scheduler.enact import enact
from distkv_dask.scheduler.engines.engine import EngineState
from distkv_dask.scheduler.lifecycle.events import Event, Pause, StopAll, Tick, WorkerLost, WorkerReady
from distkv_dask.scheduler.link_survey import LinkSurvey
from distkv_dask.scheduler.tasks.submitter import Submitter
from distkv_dask.version import VERSION

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler

logger = logging.getLogger("distributed.distkv.gmanager")

ONE_VERSION = "install the same version for clients, scheduler and workers, and restart them"


class Dispatcher:
    """All engines of a cluster, on the streams and tasks of its scheduler.

    Parameters
    ----------
    scheduler
        The scheduler of this process.

    Attributes
    ----------
    engines
        By id.
    versions
        Of this package, by worker that has said which it runs.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.engines: dict[str, EngineState] = {}
        self.versions: dict[str, str] = {}
        self.submitter = Submitter(scheduler, self._task_failed)
        self.board, self.survey = Board(scheduler, self.engines), LinkSurvey(scheduler)
        self._pacer, self._numbers = Pacer(), itertools.count(1)
        self._clock: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()

    # Engines

    async def add_engine(self, spec: EngineSpec, client: str) -> EngineState:
        """Add an engine for a client; no worker has opened it yet."""
        await self.submitter.open()
        engine = EngineState(spec, client, self._numbers, self._pacer)
        self.engines[spec.engine] = engine
        self.board.start()
        if self._clock is None:
            self._clock = asyncio.create_task(run_clock(self._pacer, self.submitter, self._tick))
        return engine

    def is_memory(self, worker: str) -> bool:
        """Whether a worker only holds KV."""
        state = self.scheduler.workers.get(worker)
        return state is not None and MEMORY_RESOURCE in state.resources

    def open_on(self, worker: str, engine: EngineState) -> None:
        """Open an engine on a worker, once its version is known, and on a memory worker the model's geometry."""
        holds = self.is_memory(worker)
        geometry = engine.geometry if holds else None
        if engine.knows(worker) or (holds and (geometry is None or engine.group is not None)):
            return
        if (version := self.versions.get(worker)) is None:
            engine.opening.await_hello(worker)
        elif version != VERSION:
            text = f"worker {worker} runs distkv-dask {version}, the scheduler {VERSION}"
            self._open_failed(engine, worker, ClusterError(f"{text}: {ONE_VERSION}"))
        elif engine.group is not None:
            self._send(engine, *engine.open_stage(worker))
        else:
            engine.opening.ask(worker)
            self._send(engine, Open(worker, engine.spec, geometry))

    async def close_engine(self, engine: str) -> None:
        """End all requests of an engine and free what it has on every worker; waits for the workers' answers."""
        state = self.engines.get(engine)
        if state is None or state.is_closing:
            return
        state.start_closing()
        self.survey.engine_closes(engine)
        self.handle(state, StopAll())
        limit = state.spec.config.timeout_close
        if state.broken is None:
            await self.submitter.drained(engine, limit)  # so that running tasks end normally, not with errors
        else:
            self.submitter.cancel(engine)  # nobody ends it
        for worker in state.open_on():
            self._send(state, Close(worker))
        await state.wait_closed(limit)
        self._pacer.rounds.pop(engine, None)
        self.board.past.absorb(self.engines.pop(engine).figures)
        if not self.engines:
            self.board.stop()
            if self._clock is not None:
                self._clock.cancel()
                self._clock = None
            await self.submitter.close()
        self.scheduler.log_event(PLUGIN, {"action": "close", "engine": engine})

    def close_soon(self, engine: str) -> None:
        """Close an engine after the current event has been handled."""
        task = asyncio.create_task(self.close_engine(engine))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def shut_down(self, error: EngineClosedError) -> None:
        """The scheduler shuts down: every request ends."""
        if self._clock is not None:
            self._clock.cancel()
        self.board.stop()
        for engine in self.engines.values():
            engine.fail(error)
        await self.submitter.close()

    # Workers

    def worker_came(self, worker: str, version: str) -> None:
        """A worker has joined with this version of the package."""
        self.versions[worker] = version
        for state in self.engines.values():
            if not state.is_closing:
                self.open_on(worker, state)

    def worker_left(self, worker: str) -> None:
        """A worker died or left."""
        self.versions.pop(worker, None)
        for state in list(self.engines.values()):
            if state.group is not None:
                state.group.gone(worker)
            self._lose(state, worker, "died or left")
        self.submitter.worker_lost(worker)

    def take_message(self, state: EngineState, message: did.FromWorker) -> None:
        """Handle a message of a worker."""
        if state.group is not None and state.group.is_old(message):
            return
        match message:
            case did.Opened():
                self._opened(state, message)
            case did.OpenFailed(worker, error):
                self._open_failed(state, worker, error)
                if state.group is not None:
                    state.group.fail(worker)
                    self._regroup(state, worker)
            case did.Closed(worker) if state.is_closing:
                state.closed(worker)
            case did.Closed(worker):  # not requested: the worker is about to leave
                self._lose(state, worker, "closes")
            case did.Lost(worker, reason):
                self._engine_lost(state, worker, reason)
            case did.AdaptersKept():
                state.adapters_kept(message)
            case did.GangFailed(worker, gang, EngineClosedError()) if state.waits_for(gang):
                self._lose(state, worker, "closed the engine")
            case did.GangFailed():
                self._gang_failed(state, message)
            case did.ChunkDone() | did.Prefilled():
                state.prefilled(message)
                self.handle(state, message)
            case did.WindowDone():
                self.submitter.hurry(message.worker)
                state.figures.window(message.worker, message.result)
                self.handle(state, message)
            case _:
                self.handle(state, message)

    def _opened(self, state: EngineState, message: did.Opened) -> None:
        state.ready(message)
        if message.role != "stage":
            rooms = message.spill_bytes, message.host_bytes, message.places
            decodes = message.role == "instance"
            self.handle(state, WorkerReady(message.endpoint, message.capacity_blocks, decodes, *rooms))
            self.survey.worker_opened(state)
        elif state.group is not None:
            self._send(state, *state.group.openings(message.worker, state.facts))

    def _open_failed(self, state: EngineState, worker: str, error: Exception) -> None:
        """A worker is not part of an engine; a client is told only if it waits for the engine to open."""
        logger.error("engine %s cannot open on %s: %s", state.spec.engine, worker, error)
        state.figures.happened(monotonic(), "failure", f"worker {worker} cannot open it: {without_quotes(error)}")
        state.open_failed(worker, error)

    def _lose(self, state: EngineState, worker: str, how: str) -> None:
        """An engine lost a worker: its blocks are recomputed."""
        if worker in state.facts:
            state.figures.happened(monotonic(), "loss", f"worker {worker} {how}")
        state.worker_lost(worker)
        self.handle(state, WorkerLost(worker))
        self._regroup(state, worker)

    def _regroup(self, state: EngineState, gone: str) -> None:
        """A worker is gone, perhaps with a stage: the home closes, and others take the places."""
        if state.group is None or state.is_closing or (home := state.group.leave(gone)) is None:
            return
        if home:
            self._send(state, Close(home))
            self._lose(state, home, f"lost {gone}, which had further layers")
            self.submitter.worker_lost(home, state.spec.engine)
        for other in [one for one in self.scheduler.stream_comms if self.versions.get(one) == VERSION and one != gone]:
            self.open_on(other, state)

    def _engine_lost(self, state: EngineState, worker: str, reason: str) -> None:
        """A live worker lost everything of an engine because of ``reason``: it opens the engine again."""
        if state.is_closing:
            return
        logger.error("engine %s was lost on %s: %s", state.spec.engine, worker, reason)
        self._lose(state, worker, f"lost the engine: {reason}")
        self.submitter.worker_lost(worker, state.spec.engine)
        if state.opening.may_repeat(worker):
            self.open_on(worker, state)

    def _gang_failed(self, state: EngineState, failed: did.GangFailed) -> None:
        told = without_quotes(failed.error)
        self.scheduler.log_event(
            PLUGIN, {"action": "gang-failed", "engine": state.spec.engine, "gang": failed.gang, "error": told}
        )
        state.figures.happened(monotonic(), "failure", told)
        self.handle(state, failed)

    def _task_failed(self, engine: str, gang: int, error: Exception) -> None:
        """A task failed without a report from its rManager: it could not be unpickled, was cancelled, ..."""
        if engine in self.engines:
            self._gang_failed(self.engines[engine], did.GangFailed("", gang, error))

    # Events and commands

    def handle(self, state: EngineState, event: Event) -> list[do.Command]:
        """Pass an event to an engine's state machine, and carry out its commands.

        An exception ends the engine: a plan must not be carried out in part, and the machine handles no more events.
        """
        if state.broken is not None:
            return []
        try:
            commands = state.machine.handle(event, monotonic())
            with self.submitter.together():
                for command in commands:
                    enact(command, state, self.submitter, self._send)
            return commands
        except Exception as error:
            logger.exception("engine %s is broken and will be closed", state.spec.engine)
            state.broken = EngineClosedError(f"the engine is broken, see the scheduler's log: {in_words(error)}")
            state.fail(state.broken)
            self.close_soon(state.spec.engine)
            return []

    def _send(self, state: EngineState, *messages: ToWorker) -> None:
        for message in messages:
            if message.worker in self.scheduler.stream_comms:  # otherwise remove_worker is about to be called
                packed = {"op": TO_WORKER, "engine": state.spec.engine, "message": pack(message)}
                self.scheduler.worker_send(message.worker, packed)

    def _tick(self) -> None:
        paused = {worker for worker, state in self.scheduler.workers.items() if state.status == Status.paused}
        for engine in list(self.engines.values()):
            if (known := paused & engine.life.ledger.workers.keys()) != engine.life.paused:
                self.handle(engine, Pause(frozenset(known)))
            self.handle(engine, Tick())
