"""One simulated worker: what it decodes and prefills, and how long its next piece of work takes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from distkv_dask.scheduler.costs.model import PerformanceModel
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.simulate.traces import Arrival
from distkv_dask.types import Placement

QUANTUM = 0.5
"""Seconds of a decode window, and of the prefill between two windows of a home."""
WINDOW_STEPS = 64
CHUNK = 512
"""Tokens of the smallest prefill chunk."""


@dataclass(slots=True, eq=False)
class Run:
    """A request in the simulation: times in seconds, ``done`` tokens of prompt, ``left`` tokens to generate."""

    number: int
    arrival: Arrival
    admitted: float = 0.0
    first: float = 0.0
    done: int = 0
    left: int = 0
    remote: dict[str, int] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens of KV that exist."""
        return self.done + (self.arrival.output - self.left - 1 if self.first else 0)

    def lies(self, placement: Placement) -> None:
        """Remember how many tokens lie away from home."""
        self.remote = {}
        home = placement[-1].worker
        for span in placement:
            if span.worker != home:
                self.remote[span.worker] = self.remote.get(span.worker, 0) + span.tokens


@dataclass(slots=True, eq=False)
class Lane:
    """A worker's home lane, which takes turns between decode windows and prefill.

    ``stolen`` are seconds in which its holder lane computes for others before the next piece of work is done.
    """

    worker: str
    host: str
    running: dict[int, Run] = field(default_factory=dict)
    prompts: deque[Run] = field(default_factory=deque)
    busy: bool = False
    decoded_last: bool = False
    stolen: float = 0.0


class Costs:
    """Durations by the performance model, with holders' shares computed on their own workers.

    Parameters
    ----------
    model
        The performance model.
    lanes
        All workers.
    """

    def __init__(self, model: PerformanceModel, lanes: dict[str, Lane]) -> None:
        self.model = model
        self.lanes = lanes

    def window(self, lane: Lane) -> tuple[int, float]:
        """Steps and seconds of a home's next decode window."""
        curve = self.model.of(lane.worker)
        rows: dict[str, int] = {}
        tokens: dict[str, int] = {}
        local, longest = 0, 0
        for run in lane.running.values():
            away = 0
            for worker, count in run.remote.items():
                rows[worker] = rows.get(worker, 0) + 1
                tokens[worker] = tokens.get(worker, 0) + count
                away += count
            local += max(0, run.length - away)
            longest = max(longest, run.left)
        remote = [
            (worker, tokens[worker] * self.model.of(worker).token, self._exchange(lane, worker, rows[worker]))
            for worker in rows
        ]
        dense = curve.step + len(lane.running) * curve.row
        step = dense + self._parallel(lane, local * curve.token, remote)
        steps = max(1, min(WINDOW_STEPS, int(QUANTUM / step), longest))
        taken = sum(min(steps, run.left) for run in lane.running.values()) / (steps * len(lane.running))
        self._steal((worker, steps * taken * seconds) for worker, seconds, _ in remote)
        return steps, steps * (curve.step + taken * (step - curve.step))

    def chunk(self, lane: Lane, run: Run, ledger: Ledger) -> tuple[int, float]:
        """Tokens and seconds of the next chunk of a prompt, which ends with its span at the latest."""
        curve = self.model.of(lane.worker)
        tokens: dict[str, int] = {}
        end = run.arrival.prompt
        for span in ledger.sequences[run.number].placement:
            if span.stop <= run.done:
                tokens[span.worker] = tokens.get(span.worker, 0) + span.tokens
            elif span.start <= run.done:
                tokens[span.worker] = tokens.get(span.worker, 0) + run.done - span.start
                end = min(end, span.stop)
        local = tokens.pop(lane.worker, 0)
        rate = curve.prompt + max([local * curve.pair, *(n * self.model.of(w).pair for w, n in tokens.items())])
        size = min(end - run.done, max(CHUNK, int(QUANTUM / rate)))
        remote = [
            (worker, size * count * self.model.of(worker).pair, self._exchange(lane, worker, size))
            for worker, count in tokens.items()
            if count
        ]
        self._steal((worker, seconds) for worker, seconds, _ in remote)
        attention = curve.prefill(size, local) - size * curve.prompt
        return size, size * curve.prompt + self._parallel(lane, attention, remote)

    def _exchange(self, lane: Lane, worker: str, rows: int) -> float:
        return self.model.exchange(self.model.link(lane.host, self.lanes[worker].host), rows)

    def _parallel(self, lane: Lane, local: float, remote: list[tuple[str, float, float]]) -> float:
        """All parts of attention at once: the slowest counts, and exchanges with other hosts share one network card."""
        card = sum(exchange for worker, _, exchange in remote if self.lanes[worker].host != lane.host)
        parts = [
            seconds + (card if self.lanes[worker].host != lane.host else exchange)
            for worker, seconds, exchange in remote
        ]
        return max([local, *parts])

    def _steal(self, shares: Iterable[tuple[str, float]]) -> None:
        for worker, seconds in shares:
            holder = self.lanes[worker]
            if holder.busy:  # an idle one has the time
                holder.stolen += seconds
