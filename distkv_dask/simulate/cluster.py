"""The event loop: arrivals, windows, chunks and moves on modelled workers, decided by the real ledger and policies."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import Any

from distkv_dask.scheduler.costs.model import PerformanceModel
from distkv_dask.scheduler.costs.presets import Preset
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.policies import policy_named
from distkv_dask.scheduler.policies.base import Ask
from distkv_dask.scheduler.policies.queue import Admission, prefill_slots
from distkv_dask.simulate.lane import Costs, Lane, Run
from distkv_dask.simulate.single import as_one
from distkv_dask.simulate.traces import Arrival
from distkv_dask.types import Endpoint, Move

BLOCK_TOKENS = 64
BATCH = 256
"""Sequences that one instance decodes together (vLLM's default)."""
REBALANCE = 1.0
"""Seconds between two questions to the policy what should move."""
WATCHED = 64
"""Waiting requests that a policy sees when it proposes moves."""


@dataclass(slots=True)
class Outcome:
    """What happened: finished runs with their end times, refused arrivals, moved blocks, memory over time."""

    policy: str
    workers: int
    finished: list[tuple[Run, float]] = field(default_factory=list)
    refused: list[Arrival] = field(default_factory=list)
    moved_blocks: int = 0
    seconds: float = 0.0
    memory: list[tuple[float, list[float]]] = field(default_factory=list)
    """Times, and what share of its pool each worker uses then."""


def without_prefill(model: PerformanceModel) -> PerformanceModel:
    """The same model where prompts cost nothing."""
    return replace(model, curve=replace(model.curve, prompt=0.0, pair=0.0))


class Simulation:
    """A cluster of equal workers that serves a trace.

    Parameters
    ----------
    preset
        Model and worker.
    workers
        How many there are.
    policy
        A policy's name; ``single`` makes one worker of them all.
    prefill
        False where prompts come with their KV, computed by others.
    pipeline
        False where ``single`` is tensor parallel over all hosts.
    """

    def __init__(
        self, preset: Preset, workers: int, policy: str, *, prefill: bool = True, pipeline: bool = True
    ) -> None:
        self.prefill = prefill
        self.preset = as_one(preset, workers, pipeline=pipeline) if policy == "single" else preset
        self.outcome = Outcome(policy, workers)
        self.ledger = Ledger(BLOCK_TOKENS, BATCH)
        known = self.preset.model if prefill else without_prefill(self.preset.model)
        self.policy = policy_named(policy, known)
        self.admission = Admission(self.ledger, self.policy)
        self.lanes: dict[str, Lane] = {}
        for number in range(1 if policy == "single" else workers):
            name, host = f"w{number:05}", f"h{number // self.preset.per_host:04}"
            self.ledger.add_worker(Endpoint(name, host, 0), self.preset.kv_tokens // BLOCK_TOKENS)
            self.lanes[name] = Lane(name, host)
        self.costs = Costs(self.preset.model, self.lanes)
        self.runs: dict[int, Run] = {}
        self.prefilling = 0
        self.now = 0.0
        self._events: list[tuple[float, int, Any, tuple[Any, ...]]] = []
        self._order = count()

    def run(self, arrivals: Sequence[Arrival]) -> Outcome:
        """Serve all requests and return what happened."""
        limit = self.policy.limit(self.ledger)
        for number, arrival in enumerate(arrivals):
            if self.ledger.blocks(arrival.tokens) > limit:
                self.outcome.refused.append(arrival)
            else:
                self._at(arrival.at, self._arrive, number, arrival)
        self._at(0.0, self._tick)
        while self._events:
            self.now, _, event, arguments = heapq.heappop(self._events)
            event(*arguments)
        self.outcome.seconds = max((end for _, end in self.outcome.finished), default=0.0)
        return self.outcome

    def _at(self, time: float, event: Any, *arguments: Any) -> None:
        heapq.heappush(self._events, (time, next(self._order), event, arguments))

    # Requests

    def _arrive(self, number: int, arrival: Arrival) -> None:
        self.runs[number] = Run(number, arrival, left=arrival.output)
        self.admission.wait(Ask(number, arrival.prompt, arrival.tokens, self.now))
        self._at(self.now, self._admit)  # once all that come at this time are in the queue

    def _admit(self) -> None:
        while self.admission and self.prefilling < prefill_slots(self.ledger):
            admitted = self.admission.admit()
            if admitted is None:
                return
            run = self.runs[admitted[0].sequence]
            run.admitted = self.now
            run.lies(admitted[1])
            self.prefilling += 1
            if self.prefill:
                self._queue(run)
            else:
                run.done = run.arrival.prompt
                self._decode(run)

    def _queue(self, run: Run) -> None:
        """Hand a prompt to the worker that holds its next token."""
        spans = self.ledger.sequences[run.number].placement
        lane = self.lanes[next(span.worker for span in spans if run.done < span.stop)]
        lane.prompts.append(run)
        self._start(lane)

    # Lanes

    def _start(self, lane: Lane) -> None:
        """Begin the next piece of work of a worker that does nothing."""
        if lane.busy:
            return
        if lane.running and not (lane.prompts and lane.decoded_last):
            steps, seconds = self.costs.window(lane)
            self._work(lane, seconds, True, self._window_done, lane, steps)
        elif lane.prompts:
            run = lane.prompts[0]
            tokens, seconds = self.costs.chunk(lane, run, self.ledger)
            self._work(lane, seconds, False, self._chunk_done, lane, run, tokens)

    def _work(self, lane: Lane, seconds: float, decode: bool, event: Any, *arguments: Any) -> None:
        lane.busy, lane.decoded_last = True, decode
        self._at(self.now + seconds + lane.stolen, event, *arguments)
        lane.stolen = 0.0

    def _window_done(self, lane: Lane, steps: int) -> None:
        lane.busy = False
        ended = []
        for run in lane.running.values():
            run.left = max(0, run.left - steps)
            if run.left:
                self.ledger.commit(run.number, run.length)
            else:
                ended.append(run)
        for run in ended:
            self._end(lane, run)
        if ended:
            self._admit()
        self._start(lane)

    def _chunk_done(self, lane: Lane, run: Run, tokens: int) -> None:
        lane.busy = False
        run.done += tokens
        self.ledger.commit(run.number, run.done)
        placement = self.ledger.sequences[run.number].placement
        if run.done == run.arrival.prompt:
            lane.prompts.popleft()
            self._decode(run)
            self._admit()
        elif not any(span.worker == lane.worker and span.start <= run.done < span.stop for span in placement):
            lane.prompts.popleft()
            self._queue(run)
        self._start(lane)

    def _decode(self, run: Run) -> None:
        """A prompt is complete and its first token drawn."""
        self.prefilling -= 1
        run.first = self.now
        run.left -= 1
        home = self.lanes[self.ledger.sequences[run.number].placement[-1].worker]
        home.running[run.number] = run
        if not run.left:
            self._end(home, run)
        self._start(home)

    def _end(self, lane: Lane, run: Run) -> None:
        del lane.running[run.number]
        del self.runs[run.number]
        self.ledger.release(run.number)
        self.outcome.finished.append((run, self.now))

    # Moves and memory

    def _tick(self) -> None:
        """Ask the policy what should move, and note how full the workers are."""
        accounts = self.ledger.workers.values()
        self.outcome.memory.append((self.now, [account.used / max(1, account.capacity) for account in accounts]))
        for move in self.policy.moves(self.ledger, islice(self.admission.turns(), WATCHED)):
            if not self.ledger.objection(move) and move.sequence in self.runs:
                self.ledger.start_move(move)
                link = self.preset.model.link(self.lanes[move.source].host, self.lanes[move.target].host)
                seconds = self.preset.model.transfer(link, move.tokens)
                self._at(self.now + seconds, self._moved, move)
        if self._events:
            self._at(self.now + REBALANCE, self._tick)

    def _moved(self, move: Move) -> None:
        if move not in self.ledger.moves:
            return
        placement = self.ledger.finish_move(move)
        self.outcome.moved_blocks += self.ledger.blocks(move.tokens)
        run = self.runs[move.sequence]
        before = next((lane for lane in self.lanes.values() if move.sequence in lane.running), None)
        run.lies(placement)
        home = self.lanes[placement[-1].worker]
        if before is not None and before is not home:
            home.running[run.number] = before.running.pop(run.number)
            self._start(home)
        self._admit()
