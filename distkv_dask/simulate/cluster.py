"""The event loop: the state machine that runs an engine, and modelled workers, with times by the performance model."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import count, groupby
from typing import Any

from distkv_dask.errors import InvalidRequestError
from distkv_dask.gang import DecodeWindow, PrefillChunk
from distkv_dask.messages import from_worker as did
from distkv_dask.messages import to_worker as to
from distkv_dask.messages.client_calls import Delivery, Generate
from distkv_dask.sampling import SamplingParams
from distkv_dask.scheduler import commands as do
from distkv_dask.scheduler.costs.pacer import TASK_SECONDS
from distkv_dask.scheduler.costs.presets import Preset
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.lifecycle.events import Event, Submit, Tick, WorkerLost, WorkerReady
from distkv_dask.simulate.lane import Costs, Lane, Work
from distkv_dask.simulate.outcome import Outcome, Run
from distkv_dask.simulate.prompts import Prompt
from distkv_dask.simulate.settings import BLOCK_TOKENS, machine
from distkv_dask.simulate.single import as_one
from distkv_dask.simulate.traces import Arrival
from distkv_dask.simulate.workers import Asked, Workers

TICK = 1.0
"""Seconds between two ticks of the state machine at the start."""
TICKS = 50
"""Later, the pause between two ticks is the simulated time divided by this."""
IDLE = 10_000
"""Ticks without any other event after which a run counts as stuck; all waits for workers end long before."""


class Simulation:
    """A cluster of equal workers that serves a trace.

    Parameters
    ----------
    preset
        Model and worker.
    workers
        Number of workers.
    policy
        A policy's name; ``single`` makes one worker of them all.
    prefill
        False if prompts come with their KV, computed elsewhere.
    pipeline
        False if ``single`` is tensor parallel over all hosts.
    """

    def __init__(
        self, preset: Preset, workers: int, policy: str, *, prefill: bool = True, pipeline: bool = True
    ) -> None:
        self.prefill = prefill
        self.preset = as_one(preset, workers, pipeline=pipeline) if policy == "single" else preset
        self.outcome = Outcome(policy, workers)
        self.machine = machine(self.preset, policy, prefill=prefill)
        self.workers = Workers()
        names = [f"w{number:05}" for number in range(1 if policy == "single" else workers)]
        self.lanes = {name: Lane(name, f"h{at // self.preset.per_host:04}") for at, name in enumerate(names)}
        self.costs = Costs(self.preset.model, self.lanes)
        self.now = 0.0
        self._runs: dict[int, Run] = {}
        self._left = self._tasks = self._idle = 0
        self._ready: list[Lane] = []
        self._held: dict[int, tuple[Lane, PrefillChunk]] = {}
        self._events: list[tuple[float, int, Any, tuple[Any, ...]]] = []
        self._order = count()

    @property
    def ledger(self) -> Ledger:
        """Where the KV of all requests is."""
        return self.machine.state.ledger

    def run(self, arrivals: Sequence[Arrival], losses: Sequence[tuple[float, int]] = ()) -> Outcome:
        """Serve all requests and return what happened.

        Parameters
        ----------
        losses
            Seconds after the start, and the number (from 0) of the worker that is lost then.

        Raises
        ------
        InvalidRequestError
            There is no worker with such a number.
        """
        life = self.machine.state
        if not any(arrival.blocks for arrival in arrivals):
            life.cache.enabled = False  # no two prompts begin alike, so it would find nothing
        for lane in self.lanes.values():
            self.workers.add(lane.worker)
            capacity = self.preset.kv_tokens // BLOCK_TOKENS
            self._handle(WorkerReady(lane.endpoint, capacity, spill_bytes=life.config.spill))
        for time, number in losses:
            self._at(time, self._lose, self._name(number))
        numbered = sorted(enumerate(arrivals), key=lambda one: one[1].at)
        for at, together in groupby(numbered, key=lambda one: one[1].at):
            self._at(at, self._arrive, list(together))
        self._left = len(arrivals)
        self._at(0.0, self._tick)
        while self._events:
            self.now, _, event, arguments = heapq.heappop(self._events)
            event(*arguments)
            while self._ready:
                self._begin_work(self._ready.pop())
        self.outcome.seconds = max((end for _, end in self.outcome.finished), default=0.0)
        self.outcome.moved_blocks = life.moves.moved_blocks
        return self.outcome

    def _name(self, number: int) -> str:
        if not 0 <= number < len(self.lanes):
            raise InvalidRequestError(f"worker {number} does not exist: choose one from 0 to {len(self.lanes) - 1}")
        return list(self.lanes)[number]

    def _at(self, time: float, event: Any, *arguments: Any) -> None:
        heapq.heappush(self._events, (time, next(self._order), event, arguments))

    # The state machine

    def _handle(self, event: Event) -> None:
        for command in self.machine.handle(event, self.now):
            self.workers.enact(command)
            self._enact(command)

    def _enact(self, command: do.Command) -> None:
        """Carry out a command; its work takes time."""
        life = self.machine.state
        match command:
            case Delivery(sequence):
                self._deliver(self._runs[sequence], command)
            case do.SubmitWindow(window):
                self._queue(window.gang.home, window)
            case do.SubmitPrefill(chunks):
                self._prefill(chunks[0])
            case to.Reserve(_, sequence) if sequence in self._runs:
                self._runs[sequence].admitted = min(self._runs[sequence].admitted, self.now)
            case to.Relocate(home):
                self._queue(home, command)
            case to.Retire(worker):
                if self.lanes[worker].current is None:
                    self._at(self.now, self._answer, command)
                else:
                    self.lanes[worker].after.append(command)
            case to.Expect() | to.Send() | to.Store() | to.Fetch():
                seconds = self.costs.copy(command, life.config.move_tokens_per_step)
                self._at(self.now + seconds, self._answer, command)
            case to.Abort(worker, gang):
                lane = self.lanes[worker]
                if lane.current is not None and lane.current.gang.number == gang:
                    self._free(lane)
            case do.ForgetTasks(gang, finished) if not finished and gang.home in self.lanes:
                self.lanes[gang.home].drop(gang.number)
            case do.Refuse(sequence):
                self._end(sequence, served=False)

    def _answer(self, message: Asked) -> None:
        """A worker has carried out a message."""
        answer = self.workers.answer(message)
        if answer is not None:
            self._handle(answer)

    # Requests

    def _arrive(self, together: Sequence[tuple[int, Arrival]]) -> None:
        self._runs |= {number: Run(number, arrival) for number, arrival in together}
        self._handle(Submit(tuple(self._submission(number, arrival) for number, arrival in together)))

    def _submission(self, number: int, arrival: Arrival) -> Generate:
        sampling = SamplingParams(max_new_tokens=arrival.output, ignore_eos=True)
        ids = arrival.blocks
        if not ids and self.machine.state.cache.enabled:
            ids = (-1 - number,)  # unique tokens: no id of a trace is negative
        return Generate(number, Prompt(arrival.prompt, ids), sampling)

    def _deliver(self, run: Run, news: Delivery) -> None:
        if news.tokens:
            run.first = min(run.first, self.now)
        if news.reason is not None:
            self._end(run.number, served=news.error is None)

    def _end(self, sequence: int, *, served: bool) -> None:
        self._left -= 1
        run = self._runs.pop(sequence)
        if served:
            self.outcome.finished.append((run, self.now))
        else:
            self.outcome.refused.append(run.arrival)

    def _prefill(self, chunk: PrefillChunk) -> None:
        if self.prefill:
            self._queue(chunk.gang.home, chunk)
        else:
            self._at(self.now, self._chunk_done, chunk)

    # Lanes

    def _queue(self, worker: str, item: DecodeWindow | PrefillChunk | to.Relocate) -> None:
        self.lanes[worker].queue.append(item)
        self._ready.append(self.lanes[worker])

    def _begin_work(self, lane: Lane) -> None:
        """Begin the next piece of work of an idle lane."""
        if lane.current is not None or not lane.queue or lane.worker not in self.lanes:
            return
        match item := lane.queue.popleft():
            case DecodeWindow(gang, number):
                work = self.costs.window(lane, item, self.workers.batches[lane.worker])
                self._work(lane, item, work.seconds, self._window_done, lane, item, work)
                self._handle(did.WindowStarted(lane.worker, number))
            case PrefillChunk(gang):
                self._work(lane, item, self.costs.chunk(lane, item), self._lane_chunk_done, lane, item)
                self._handle(did.ChunkStarted(lane.worker, gang.number))
            case to.Relocate():
                self._answer(item)
                self._ready.append(lane)

    def _work(self, lane: Lane, item: DecodeWindow | PrefillChunk, seconds: float, event: Any, *arguments: Any) -> None:
        lane.current = item
        self._at(self.now + seconds + lane.stolen, event, *arguments)
        lane.stolen = 0.0

    def _free(self, lane: Lane) -> None:
        """A lane's current work has ended."""
        lane.current = None
        for message in lane.after:
            self._at(self.now, self._answer, message)
        lane.after.clear()
        self._ready.append(lane)

    def _window_done(self, lane: Lane, window: DecodeWindow, work: Work) -> None:
        if lane.current is window:
            self._free(lane)
            self._tasks += 1 + len(window.gang.holders)
            self._handle(self.workers.decode(window, work.parts, work.steps, work.seconds, work.used))

    def _lane_chunk_done(self, lane: Lane, chunk: PrefillChunk) -> None:
        if lane.current is not chunk:
            return
        if self.workers.waits(chunk):  # its last layer waits for that of another chunk
            self._held[chunk.gang.number] = lane, chunk
            return
        self._free(lane)
        self._tasks += 1 + len(chunk.gang.holders)
        self._chunk_done(chunk)

    def _chunk_done(self, chunk: PrefillChunk) -> None:
        if not self.workers.is_next(chunk):
            return  # it was abandoned
        following = next(chain[1:2] for chain in self.workers.chunks if chain[0] is chunk)
        answer = self.workers.compute(chunk)
        for one in following:
            self._prefill(one)
        self._handle(answer)
        held, self._held = self._held, {}
        for waiting in held.values():
            self._lane_chunk_done(*waiting)

    # Time and losses

    def _tick(self, elapsed: float = 0.0) -> None:
        """Pass a tick to the state machine, and record how full the workers are."""
        life = self.machine.state
        used = {name: account.used / max(1, account.capacity) for name, account in self.ledger.workers.items()}
        self.outcome.memory.append((self.now, used))
        if elapsed:
            life.pacer.measured(elapsed, self._tasks * TASK_SECONDS, self._tasks, 0)
            self._tasks = 0
        self._handle(Tick())
        self._idle = 0 if self._events else self._idle + 1
        if self._idle > IDLE:
            raise RuntimeError(f"{self._left} requests neither end nor make progress")
        if self._left:
            pause = max(TICK, self.now / TICKS)
            self._at(self.now + pause, self._tick, pause)

    def _lose(self, worker: str) -> None:
        lane = self.lanes.pop(worker, None)
        if lane is not None:
            lane.current = None
            lane.queue.clear()
            self.workers.remove(worker)
            self._handle(WorkerLost(worker))
