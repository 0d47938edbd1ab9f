"""One simulated worker's home lane, and how long each piece of work takes on it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import ceil

from distkv_dask.gang import DecodeWindow, PrefillChunk
from distkv_dask.messages.names import SpilledFile, sequence_in_pool
from distkv_dask.messages.to_worker import Fetch, Relocate, Retire, Send, Store, ToWorker
from distkv_dask.placement import Endpoint, Placement
from distkv_dask.scheduler.costs.model import Link, PerformanceModel
from distkv_dask.scheduler.records.disks import BYTES_PER_SECOND
from distkv_dask.simulate.workers import Decoding


@dataclass(slots=True, eq=False)
class Lane:
    """A worker's home lane: one piece of work after the other, in the order of arrival.

    ``queue`` waits for the ``current`` one; ``after`` are answered as soon as that has ended, before everything that
    waits. ``stolen`` are seconds in which its holder lane computes for others before the current work is done.
    """

    worker: str
    host: str
    queue: deque[DecodeWindow | PrefillChunk | Relocate] = field(default_factory=deque)
    current: DecodeWindow | PrefillChunk | None = None
    after: list[Retire] = field(default_factory=list)
    stolen: float = 0.0

    @property
    def endpoint(self) -> Endpoint:
        """The address at which it would listen."""
        return Endpoint(self.worker, self.host, 0)

    def drop(self, gang: int) -> None:
        """Remove a gang's work from the queue."""
        self.queue = deque(item for item in self.queue if isinstance(item, Relocate) or item.gang.number != gang)


@dataclass(frozen=True, slots=True)
class Work:
    """A running window: its ``steps`` and ``seconds``, and the holders that it needs.

    ``parts`` are the tokens of each sequence, and its placement.
    """

    steps: int
    seconds: float
    parts: dict[int, tuple[int, Placement]]
    used: tuple[str, ...]


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

    def window(self, lane: Lane, window: DecodeWindow, batch: Mapping[int, Decoding]) -> Work:
        """A home's decode window with its batch."""
        if not batch:
            return Work(0, 0.0, {}, ())
        curve = self.model.of(lane.worker)
        rows, tokens, local = _read(lane.worker, batch.values())
        remote = [
            (worker, tokens[worker] * self.model.of(worker).token, self._exchange(lane, worker, rows[worker]))
            for worker in rows
        ]
        dense = curve.step + len(batch) * curve.row
        step = dense + self._parallel(lane, local * curve.token, remote)
        longest = max(entry.remaining for entry in batch.values())
        steps = max(1, min(window.steps or longest, ceil(window.seconds / step), longest))
        parts = {number: (min(steps, entry.remaining), entry.placement) for number, entry in batch.items()}
        taken = sum(tokens for tokens, _ in parts.values()) / (steps * len(batch))
        self._steal((worker, steps * taken * seconds) for worker, seconds, _ in remote)
        return Work(steps, steps * (curve.step + taken * (step - curve.step)), parts, tuple(rows))

    def chunk(self, lane: Lane, chunk: PrefillChunk) -> float:
        """Seconds of a chunk of a prompt."""
        curve, size = self.model.of(lane.worker), len(chunk.tokens)
        tokens: dict[str, int] = {}
        for span in chunk.placement:
            if filled := span.filled(chunk.start):
                tokens[span.worker] = tokens.get(span.worker, 0) + filled
        local = tokens.pop(lane.worker, 0)
        remote = [
            (worker, size * count * self.model.of(worker).pair, self._exchange(lane, worker, size))
            for worker, count in tokens.items()
        ]
        self._steal((worker, seconds) for worker, seconds, _ in remote)
        attention = curve.prefill(size, local) - size * curve.prompt
        return size * curve.prompt + self._parallel(lane, attention, remote)

    def copy(self, message: ToWorker, tokens_per_step: int) -> float:
        """Seconds in which a worker copies, writes or reads blocks, of moves ``tokens_per_step`` in a decode step."""
        model = self.model
        match message:
            case Send(source, _, _, start, stop, target, pace) if target in self.lanes:
                link = model.link(self.lanes[source].endpoint, self.lanes[target].endpoint)
                return max(model.transfer(link, stop - start), pace * (stop - start) / tokens_per_step)
            case Store(ranges=ranges):
                return sum(stop - start for start, stop in ranges) * model.shape.kv_bytes / BYTES_PER_SECOND
            case Fetch(worker, ranges=ranges, saved=saved):
                from_pools = seconds = 0.0
                for file in saved.files:
                    if isinstance(file, SpilledFile) and sequence_in_pool(file.name) is not None:
                        tokens = _common(ranges, file.start, file.stop)
                        from_pools += tokens
                        seconds += model.transfer(self._link(worker, file.worker), tokens)
                on_disk = sum(stop - start for start, stop in ranges) - from_pools
                return on_disk * model.shape.kv_bytes / BYTES_PER_SECOND + seconds
        return 0.0

    def _exchange(self, lane: Lane, worker: str, rows: int) -> float:
        return self.model.exchange(self._link(lane.worker, worker), rows)

    def _link(self, worker: str, other: str) -> Link:
        """The link of two workers; the usual one to a worker that is gone."""
        if worker not in self.lanes or other not in self.lanes:
            return self.model.inside
        return self.model.link(self.lanes[worker].endpoint, self.lanes[other].endpoint)

    def _parallel(self, lane: Lane, local: float, remote: list[tuple[str, float, float]]) -> float:
        """Seconds of all parts of attention at once, by the slowest; exchanges between hosts share one network card."""
        card = sum(exchange for worker, _, exchange in remote if self.lanes[worker].host != lane.host)
        parts = [
            seconds + (card if self.lanes[worker].host != lane.host else exchange)
            for worker, seconds, exchange in remote
        ]
        return max([local, *parts])

    def _steal(self, shares: Iterable[tuple[str, float]]) -> None:
        for worker, seconds in shares:
            holder = self.lanes[worker]
            if holder.current is not None:  # an idle one has the time
                holder.stolen += seconds


def _common(ranges: Iterable[tuple[int, int]], start: int, stop: int) -> int:
    """How many of the tokens in some ranges are in ``[start, stop)``."""
    return sum(max(0, min(last, stop) - max(first, start)) for first, last in ranges)


def _read(home: str, batch: Iterable[Decoding]) -> tuple[dict[str, int], dict[str, int], int]:
    """Sequences and tokens of KV by holder, and tokens at home, that a step reads; shared tokens count once."""
    rows: dict[str, int] = {}
    tokens: dict[str, int] = {}
    seen: set[tuple[int | None, int]] = set()
    local = 0
    for entry in batch:
        away = 0
        for worker, count in entry.remote.items():
            rows[worker] = rows.get(worker, 0) + 1
            tokens[worker] = tokens.get(worker, 0) + count
            away += count
        for span in entry.shared:
            away += span.tokens
            if span.worker != home:
                rows[span.worker] = rows.get(span.worker, 0) + 1
            if (span.document, span.start) in seen:
                continue
            seen.add((span.document, span.start))
            if span.worker == home:
                local += span.tokens
            else:
                tokens[span.worker] = tokens.get(span.worker, 0) + span.tokens
        local += max(0, entry.length - away)
    return rows, tokens, local
