"""The state machine of one engine: events and times go in, commands come out.

The package that an event concerns handles it. Then requests change their states, free room is given to waiting
requests, homes get their next windows, and moves start. Nothing is lazy, and nothing happens between two events.
"""

from __future__ import annotations

from distkv_dask.errors import DistKVError, StateLostError
from distkv_dask.messages import from_worker as did
from distkv_dask.messages.client_calls import Delivery, Submission
from distkv_dask.sampling import FinishReason
from distkv_dask.scheduler.cache import copies, disk, documents, prefix_cache, snapshots
from distkv_dask.scheduler.commands import Command, Refuse
from distkv_dask.scheduler.lifecycle import files, losses, retirement, retries, stalls
from distkv_dask.scheduler.lifecycle.admission import admit
from distkv_dask.scheduler.lifecycle.arrivals import arrived
from distkv_dask.scheduler.lifecycle.ends import end, end_document
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
from distkv_dask.scheduler.lifecycle.progress import chunk_done, window_done
from distkv_dask.scheduler.lifecycle.transitions import settle
from distkv_dask.scheduler.moves import drain, migration
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.request import Request
from distkv_dask.scheduler.records.states import Fetching, Retiring, Stored, Waiting
from distkv_dask.scheduler.work import chunks, homes, prefill

STARTS = did.WindowStarted | did.ChunkStarted
"""Events that free no room: a start."""


class Lifecycle:
    """Requests of one engine, from submission until their blocks are free.

    Parameters
    ----------
    state
        The engine's state; others may read it.
    """

    def __init__(self, state: MachineState) -> None:
        self.state = state

    def handle(self, event: Event, now: float) -> list[Command]:
        """Handle an event at a time of the gManager's clock, in seconds.

        Raises
        ------
        RuntimeError, ValueError, TypeError
            A bug: the engine must not continue.
        """
        life = self.state
        life.now = now
        self._dispatch(event)
        settle(life)
        if not isinstance(event, STARTS):
            admit(life)
        if isinstance(event, Tick) and stalls.refuse(life):
            settle(life)
            admit(life)  # a refused request may have been the last that needed a document
        homes.fill(life)
        if not isinstance(event, STARTS):
            drain.start_moves(life)
            settle(life)  # it stops sequences that fit no other home: their blocks do not move
            for move in life.policy.moves(life.ledger, life.queue.turns()):
                if migration.can_start(life, move):
                    migration.start(life, move)
            copies.copy_ahead(life)
        commands = list(life.commands)
        life.commands.clear()
        return commands

    def _dispatch(self, event: Event) -> None:
        life = self.state
        match event:
            case did.ChunkStarted():
                life.starts.chunk_began(event.gang)
                prefill.chunk_began(life, event.gang)
            case did.ChunkDone() | did.Prefilled():
                chunk_done(life, event)
            case did.WindowStarted():
                life.starts.window_began(event.worker)
                homes.window_started(life, event.worker, event.window)
            case did.WindowDone():
                window_done(life, event)
            case did.GangFailed():
                self._failed(event)
            case did.Retired():
                self._retired(event)
            case did.Expected() if event.transfer.kind == "copy":
                copies.expected(life, event)
            case did.Expected():
                migration.expected(life, event)
            case did.Sent() if event.transfer.kind == "copy":
                copies.sent(life, event)
            case did.Sent():
                migration.sent(life, event)
            case did.Relocated():
                migration.relocated(life, event)
            case did.Stored():
                files.stored(life, event)
            case did.Fetched():
                self._fetched(event)
            case Submit():
                life.arrived = life.now
                for submission in event.submissions:
                    self._submit(submission)
            case Stop():
                self._stop(event.sequence, event.reason)
            case StopAll():
                life.is_closing = True
                prefix_cache.close(life)
                for sequence in list(life.requests):
                    self._stop(sequence, "cancelled")
                    settle(life)
            case WorkerReady():
                self._worker_ready(event)
            case WorkerLost():
                self._worker_lost(event.worker)
            case Drain():
                if event.worker in life.ledger.workers:
                    drain.set_leaving(life, event.worker, event.leaving)
            case Pause():
                drain.set_paused(life, event.workers)
            case Tick():
                self._tick()
            case _:
                raise TypeError(f"no handler for {event!r}")

    # Workers

    def _worker_ready(self, event: WorkerReady) -> None:
        life, worker = self.state, event.endpoint.worker
        if worker in life.ledger.workers:
            return
        life.disks.add(worker, event.spill_bytes, event.host_bytes)
        lends = int(event.capacity * life.config.lend_limit) if event.can_decode else event.capacity
        life.ledger.add_worker(
            event.endpoint, event.capacity, lend_limit=lends, can_decode=event.can_decode, places=event.places
        )
        life.largest_blocks = max(life.largest_blocks, life.policy.limit(life.ledger))
        homes.add(life, worker)

    def _worker_lost(self, worker: str) -> None:
        life = self.state
        if worker not in life.ledger.workers:
            return
        lost = life.ledger.remove_worker(worker)
        lost = [number for number in lost if not isinstance(life.requests[number].state, Retiring)]
        snapshots.worker_lost(life, worker)
        prefix_cache.worker_lost(life, worker)
        life.calibration.forget_worker(worker)
        life.leaving.discard(worker)
        life.paused.discard(worker)
        homes.remove(life, worker)
        migration.worker_lost(life, worker, lost)
        disk.worker_lost(life, worker)
        homes.holder_lost(life, worker, lost)
        for sequence in lost:
            if sequence in life.ledger.sequences:
                losses.lost(life, life.requests[sequence], worker)
                settle(life)
        for request in list(life.requests.values()):
            request.retires.pop(worker, None)
            if isinstance(request.state, Retiring):
                retirement.retired(life, request, worker)
                settle(life)

    # Requests

    def _submit(self, one: Submission) -> None:
        try:
            self._accept(arrived(self.state, one))
        except DistKVError as error:
            self.state.command(Refuse(one.number, error))

    def _accept(self, request: Request) -> None:
        life = self.state
        document = life.document_of(request)
        is_stored = document is not None and isinstance(document.state, Stored)
        if request.is_save and is_stored and document is not None and not document.prompt:
            life.command(Delivery(request.sequence, (), "stop"))  # it is shorter than a block
            return
        if life.ledger.blocks(request.tokens) > life.largest_blocks:
            raise stalls.refusal(life, request)
        if request.parent is not None:
            documents.attach(life, request)
        elif not request.is_document and not request.alone:
            documents.borrow(life, request)
        life.requests[request.sequence] = request
        life.lowest_priority = min(life.lowest_priority, request.asked.sampling.priority)
        life.recommend(request, Stored() if request.is_document and not request.prompt else Waiting())

    def _stop(self, sequence: int, reason: FinishReason) -> None:
        request = self.state.requests.get(sequence)
        if request is None:
            return
        if request.demand is not None and reason == "cancelled":
            request.demand.released = True
        if request.is_document:
            if not self.state.demand(sequence).dependents:
                end_document(self.state, request)
        elif request.ended is None:
            end(self.state, request, reason)

    def _failed(self, event: did.GangFailed) -> None:
        """A gang failed on a worker."""
        if isinstance(event.error, StateLostError):
            losses.state_lost(self.state, event.gang, event.error)
        else:
            retries.failed(self.state, event.gang, event.error)

    def _retired(self, event: did.Retired) -> None:
        """A worker no longer computes on a sequence."""
        life, request = self.state, self.state.requests.get(event.sequence)
        if request is None or not request.answered(event.worker):
            return
        if isinstance(request.state, Retiring):
            retirement.retired(life, request, event.worker)
        else:
            migration.paused(life, event)

    def _fetched(self, event: did.Fetched) -> None:
        """A worker read its part of a sequence, or could not."""
        request = self.state.requests.get(event.sequence)
        state = request.state if request is not None else None
        if request is not None and isinstance(state, Retiring) and state.waits_for_reader(event.worker):
            retirement.retired(self.state, request, event.worker)
        elif isinstance(state, Fetching):
            files.fetched(self.state, event)
        else:
            migration.fetched(self.state, event)

    # Time

    def _tick(self) -> None:
        life = self.state
        homes.count_tasks(life)
        for gang, error in homes.late_windows(life):
            retries.failed(life, gang.number, error)
            settle(life)
        # A request has one late chunk at most, so none is retired twice: of a wavefront, a chunk is submitted when the
        # one before has begun (wavefront.is_due), and of other prompts only the first chunk can be late.
        for chunk, error in life.starts.late(chunks.next_chunks(life), life.now, life.config.timeout_start):
            losses.stalled(life, life.requests[chunk.sequence], error)
            settle(life)
        retries.retry_rested(life)
        migration.expire(life)
        files.expire(life)
        stalls.hold_blocks(life)
