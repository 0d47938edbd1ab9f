"""The rManager: a Dask worker plugin that holds a worker's pools, models and lanes.

It turns the gManager's messages into calls of the engines open here, and the tasks of step graphs into work on the
lanes. Lanes exist while an engine is open, and engines share them. Importing this module does not import torch: the
scheduler imports it to install the plugin.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from distributed import Worker, WorkerPlugin
from distributed.comm.core import CommClosedError
from distributed.core import Status

from distkv_dask.errors import EngineClosedError
from distkv_dask.gang import Attended, DecodeWindow, Gang, PrefillChunk
from distkv_dask.messages import to_worker as do
from distkv_dask.messages.from_worker import Closed, FromWorker, Lost
from distkv_dask.messages.names import (
    FROM_WORKER,
    MEMORY_RESOURCE,
    PLUGIN,
    TAKE_TRACE,
    TO_WORKER,
    pack,
    unpack,
)
from distkv_dask.version import VERSION
from distkv_dask.worker.exit import end_process, end_without_collection
from distkv_dask.worker.import_ahead import import_ahead
from distkv_dask.worker.open_lanes import OpenLanes
from distkv_dask.worker.opening import open_engine
from distkv_dask.worker.peers import Peers
from distkv_dask.worker.shortages import Shortages

if TYPE_CHECKING:
    from distkv_dask.worker.by_layer.tasks import LayerTasks
    from distkv_dask.worker.engine import WorkerEngine
    from distkv_dask.worker.lanes import Lanes

logger = logging.getLogger("distributed.distkv.rmanager")


class RManager(WorkerPlugin):
    """Worker plugin; installed on every worker by the gManager."""

    name = PLUGIN

    def setup(self, worker: Worker) -> None:
        """Register handlers and announce this worker to the gManager."""
        self.worker = worker
        self.engines: dict[str, WorkerEngine] = {}
        self._lanes = OpenLanes(worker, self._lane_ended)
        self._changing = asyncio.Lock()
        self._leaving = False
        self._shortages = Shortages()
        self._tasks: set[asyncio.Task[None]] = set()
        self._dropping: set[asyncio.Task[None]] = set()
        worker.stream_handlers[TO_WORKER] = self.receive
        self._peers = Peers(worker, self.engines)
        worker.handlers.update(self._peers.handlers)
        worker.handlers[TAKE_TRACE] = self.take_trace
        worker.loop.add_callback(self._send)
        if MEMORY_RESOURCE not in worker.state.total_resources:
            import_ahead()

    @property
    def lanes(self) -> Lanes | None:
        """The worker's lanes, while an engine is open."""
        return self._lanes.current

    async def teardown(self, worker: Worker) -> None:
        """Close everything (the worker leaves, or the plugin is removed)."""
        self._leaving = True
        for name in self.engines:  # before tasks fail: the gManager then repeats them elsewhere
            self.tell(name, Closed(self.worker.address))
        async with self._changing:
            pass  # an engine that is being opened
        worker.stream_handlers.pop(TO_WORKER, None)
        worker.handlers.pop(TAKE_TRACE, None)
        for operation in self._peers.handlers:
            worker.handlers.pop(operation, None)
        for name in list(self.engines):
            await self._close_engine(name)
        if worker.nanny is not None and worker.status == Status.closing:
            end_without_collection()

    # Tasks of step graphs: these run in threads of the worker and block

    def prefill(self, chunk: PrefillChunk) -> int:
        """Compute one chunk; see :func:`distkv_dask.graphs.tasks.prefill`."""
        engine = self._engine(chunk.gang.engine)  # keep the engine while the chunk is computed
        return engine.chunks.prefill(chunk)

    def decode(self, window: DecodeWindow) -> int:
        """Run one window; see :func:`distkv_dask.graphs.tasks.decode`."""
        return self._engine(window.gang.engine).decode(window)

    def attend(self, gang: Gang) -> Attended:
        """Attend one gang as a holder; see :func:`distkv_dask.graphs.tasks.attend`."""
        return self._engine(gang.engine).attend(gang)

    def layers(self, engine: str) -> LayerTasks:
        """The attention for tasks at layer granularity."""
        from distkv_dask.worker.by_layer.tasks import LayerTasks

        return LayerTasks(self._engine(engine))

    def _engine(self, name: str) -> WorkerEngine:
        try:
            return self.engines[name]
        except KeyError:
            raise EngineClosedError(f"engine {name} is not open on worker {self.worker.address}") from None

    # Messages of the gManager: these run on the worker's event loop and never block

    def receive(self, engine: str, message: Any) -> None:
        """Carry out a message (a packed :class:`~distkv_dask.messages.to_worker.ToWorker`) for one engine.

        No exception may leave this function: Dask would close the worker, with others' data.
        """
        try:
            self._do(engine, unpack(message))
        except Exception:  # the gang that needs it will fail with the reason
            logger.exception("a message of the gManager failed")  # without the message, which may have users' text

    def _do(self, name: str, message: do.ToWorker) -> None:
        match message:
            case do.Open():
                self._spawn(self._open_engine(message))
            case do.Close():
                self._spawn(self._close_engine(name))
            case _ if (engine := self.engines.get(name)) is not None:
                self._do_in(engine, name, message)

    def _do_in(self, engine: WorkerEngine, name: str, message: do.ToWorker) -> None:
        match message:
            case do.Reserve(_, sequence, start, stop):
                engine.reserve(sequence, start, stop)
            case do.Share(_, source, sequence, start, stop):
                engine.runtime.pool.share(source, sequence, start, stop)
            case do.Begin(_, sequence, source, length):
                engine.runtime.home_state.adopt(sequence, source, length)
            case do.Keep(_, sequence, lengths, ended):
                engine.runtime.home_state.keep(sequence, lengths, ended)
            case do.Retire(_, sequence):
                engine.retire(sequence)
            case do.Release(_, sequence):
                engine.release_sequence(sequence)
            case do.Free(_, sequence, start, stop):
                engine.free(sequence, start, stop)
            case do.Join(_, state, holders):
                engine.join(state, holders)
            case do.Reset(_, epoch):
                engine.reset(epoch)
            case do.Expect(_, transfer, sequence, start, stop):
                engine.expect(transfer, sequence, start, stop)
            case do.Send():
                self._peers.send_blocks(name, message)
            case do.Relocate(_, number, sequence, placement, holders):
                engine.relocate(number, sequence, placement, holders)
            case do.Store(_, transfer, sequence, ranges, saved, home):
                self._spawn(engine.files.store(transfer, sequence, ranges, saved, home))
            case do.Fetch(_, sequence, ranges, saved, home):
                self._spawn(engine.files.fetch(partial(self._peers.ask_spilled, name), sequence, ranges, saved, home))
            case do.Demote(_, files):
                engine.files.demote(files)
            case do.Discard(_, names):
                engine.files.discard(names)
            case do.Abort(_, gang, reason, unused):
                engine.abort(gang, reason, unused)
            case _:
                raise TypeError(f"no handler for {type(message).__name__}")

    def take_trace(self, engine: str) -> Any:
        """Spans of the lanes for a traced engine since the last call (packed)."""
        tracer = self.engines[engine].runtime.tracer if engine in self.engines else None
        return pack({} if tracer is None else tracer.take_spans())

    def tell(self, engine: str, message: FromWorker) -> None:
        """Send a message to the gManager, from any thread; messages of one thread arrive in order."""
        self.worker.loop.add_callback(self._send, engine, message)

    def _send(self, engine: str = "", message: FromWorker | None = None) -> None:
        """Send a message; without one, announce this worker in plain values, which every version can read."""
        if message is not None and self._is_loss(engine, message):
            return
        told = {"op": FROM_WORKER, "version": VERSION, "engine": engine}
        if message is not None:
            told["message"] = pack(message)
        with contextlib.suppress(CommClosedError):  # the scheduler is gone
            self.worker.batched_stream.send(told)

    def _is_loss(self, engine: str, message: FromWorker) -> bool:
        """Whether a message is due to a failed card: then the engine is reported as lost here instead."""
        if isinstance(message, Lost):
            return False
        if reason := self._broken(engine):
            self._leave(reason)
            return True
        if self._shortages.are_too_many(message):
            self._give_up("its card ran out of memory repeatedly", every=True)
            return True
        return False

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # Opening and closing

    async def _open_engine(self, message: do.Open) -> None:
        spec = message.spec
        async with self._changing:
            if self._leaving or spec.engine in self.engines:
                return
            lanes = partial(self._lanes.start, spec.config.threads)
            opened = await open_engine(message, lanes, self.worker, self.tell)
            if isinstance(opened, FromWorker):
                self.tell(spec.engine, opened)
            else:
                self.engines[spec.engine] = opened
                self._send(spec.engine, opened.facts)
                self._give_up("a compute thread of this worker ended while it opened the engine")
            if not self.engines:
                await self._lanes.close()

    def _lane_ended(self, reason: str) -> None:
        """In the thread that ends."""
        self.worker.loop.add_callback(self._give_up, reason)

    def _broken(self, engine: str) -> str:
        """Why the card of an engine can no longer be used; empty while it can."""
        return self.engines[engine].runtime.pool.device.lost if engine in self.engines else ""

    def _leave(self, reason: str) -> None:
        """End this process, which can no longer use its card: a nanny starts another one, with a card or without."""
        if self._leaving:
            return
        self._leaving = True
        logger.critical("worker %s ends: %s", self.worker.address, reason)
        for name in self.engines:
            self._send(name, Lost(self.worker.address, reason))
        limit = max(engine.spec.config.timeout_close for engine in self.engines.values())
        self._spawn(end_process(self.worker, reason, limit))

    def _give_up(self, reason: str, every: bool = False) -> None:
        """Report engines whose lanes have ended as lost, as if the worker had died; the gManager reopens them here.

        They are removed before it is told, because messages sent until then are for the lost engines. An engine that is
        being opened or closed now is handled there.
        """
        lost = {name: engine for name, engine in self.engines.items() if every or engine.lanes.closed}
        if self._leaving or not lost:
            return
        lanes = next(iter(lost.values())).lanes
        self._lanes.give_up(lanes)
        for name in lost:
            del self.engines[name]
        for name in lost:
            self._send(name, Lost(self.worker.address, reason))  # before the failures that result from its end
        task = self._spawn(self._drop(lost, lanes))
        self._dropping.add(task)
        task.add_done_callback(self._dropping.discard)

    async def _drop(self, lost: dict[str, WorkerEngine], lanes: Lanes) -> None:
        async with self._changing:
            while lost:
                name, engine = lost.popitem()
                self._peers.stop_sending(name)
                await asyncio.get_running_loop().run_in_executor(None, engine.close)
                del engine
            await self._lanes.close(lanes)

    async def _close_engine(self, name: str) -> None:
        try:
            async with self._changing:
                engine = self.engines.pop(name, None)
                self._peers.stop_sending(name)
                if engine is not None:
                    await asyncio.get_running_loop().run_in_executor(None, engine.close)
                del engine
                if not self.engines:
                    await self._lanes.close()
            if self._dropping:  # a lane ended while this waited for its turn
                await asyncio.wait(self._dropping)
        finally:
            self.tell(name, Closed(self.worker.address))
