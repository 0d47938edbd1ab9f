"""Figures of one engine: totals, latencies, its workers' time, a history, and recent events. Pure.

Recording an event costs a few additions; status, dashboard and Prometheus read the totals. Counters only grow, so that
rates can be computed. Times are seconds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from typing import NamedTuple

from distkv_dask.completion import Timings
from distkv_dask.gang import Exchanged, WindowResult
from distkv_dask.sampling import FinishReason

HISTORY = 600
"""Samples of the history that are kept: ten minutes at one a second."""

RECENT = 1000
"""Number of requests for percentiles of latencies."""

EVENTS = 200
"""Events that are remembered."""


class Latency:
    """Observed times: a histogram that only grows, and the recent ones for percentiles.

    Parameters
    ----------
    bounds
        Upper ends of the histogram's buckets in seconds; a last one, without end, is added.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0
        self.recent: deque[float] = deque(maxlen=RECENT)

    def observe(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.sum += seconds
        self.recent.append(seconds)

    def percentiles(self) -> dict[str, float]:
        """``p50``, ``p90`` and ``p99`` of the last :data:`RECENT` (nearest rank); empty when there are none."""
        ordered = sorted(self.recent)
        if not ordered:
            return {}
        return {f"p{part}": ordered[-(-len(ordered) * part // 100) - 1] for part in (50, 90, 99)}


@dataclass(slots=True)
class Anatomy:
    """Decode time of one home: steps, and the seconds of its windows and of the gaps between them.

    ``sending`` and ``waiting`` are the parts of ``seconds`` in which it sent queries and waited for partials.
    """

    steps: int = 0
    seconds: float = 0.0
    sending: float = 0.0
    waiting: float = 0.0
    gap: float = 0.0


class Sample(NamedTuple):
    """One sample: time, tokens prefilled and generated so far, and requests by state."""

    time: float
    prefilled: int
    generated: int
    waiting: int
    prefill: int
    decode: int


class Event(NamedTuple):
    """An event: its time, kind and text."""

    time: float
    kind: str
    text: str


@dataclass
class Figures:
    """All figures of one engine."""

    totals: defaultdict[str, float] = field(default_factory=lambda: defaultdict(int))
    finished: Counter[FinishReason] = field(default_factory=Counter)
    queue: Latency = field(default_factory=lambda: Latency((0.01, 0.1, 1, 10, 60, 600, 3600)))
    first_token: Latency = field(default_factory=lambda: Latency((0.05, 0.2, 1, 5, 20, 60, 300, 1800)))
    per_token: Latency = field(default_factory=lambda: Latency((0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 2)))
    anatomy: defaultdict[str, Anatomy] = field(default_factory=lambda: defaultdict(Anatomy))
    history: deque[Sample] = field(default_factory=lambda: deque(maxlen=HISTORY))
    events: deque[Event] = field(default_factory=lambda: deque(maxlen=EVENTS))

    def prefilled(self, tokens: int) -> None:
        """Count computed tokens of a prompt."""
        self.totals["prefilled_tokens"] += tokens

    def window(self, home: str, result: WindowResult) -> None:
        """A home finished a decode window."""
        self.exchanged(result.exchanged)
        if not result.steps:
            return
        for name, value in (
            ("windows", 1),
            ("decode_steps", result.steps),
            ("decode_seconds", result.seconds),
            ("sending_seconds", result.exchanged.sending),
            ("waiting_seconds", result.exchanged.waiting),
            ("gap_seconds", result.gap),
            ("proposed_tokens", sum(one.proposed for one in result.speculated.values())),
            ("accepted_tokens", sum(one.accepted for one in result.speculated.values())),
        ):
            self.totals[name] += value
        one = self.anatomy[home]
        one.steps += result.steps
        one.seconds += result.seconds
        one.sending += result.exchanged.sending
        one.waiting += result.exchanged.waiting
        one.gap += result.gap

    def exchanged(self, one: Exchanged) -> None:
        """Count the bytes that a window or chunk exchanged with holders."""
        self.totals["bytes_to_holders"] += one.sent_bytes
        self.totals["bytes_to_homes"] += one.received_bytes

    def generated(self, tokens: int) -> None:
        """Count tokens sent to the client."""
        self.totals["generated_tokens"] += tokens

    def ended(self, reason: FinishReason, timings: Timings, generated: int) -> None:
        """A request ended, after ``generated`` tokens."""
        self.finished[reason] += 1
        if reason in ("stop", "length"):
            self.queue.observe(timings.queued)
            self.first_token.observe(timings.queued + timings.prefill)
            if generated > 1:
                self.per_token.observe(timings.decode / (generated - 1))

    def happened(self, now: float, kind: str, text: str) -> None:
        """Remember an event."""
        self.totals[f"{kind}_events"] += 1
        self.events.append(Event(now, kind, text))

    def sample(self, now: float, states: Counter[str]) -> None:
        """Add a sample to the history; ``states`` counts the live requests by state."""
        self.history.append(
            Sample(
                now,
                int(self.totals["prefilled_tokens"]),
                int(self.totals["generated_tokens"]),
                states["waiting"],
                states["prefill"],
                states["decode"],
            )
        )

    def absorb(self, other: Figures) -> None:
        """Add the totals of an engine that was closed; nothing of its history."""
        for name, value in other.totals.items():
            self.totals[name] += value
        self.finished.update(other.finished)
        for mine, its in (
            (self.queue, other.queue),
            (self.first_token, other.first_token),
            (self.per_token, other.per_token),
        ):
            mine.counts = [a + b for a, b in zip(mine.counts, its.counts, strict=True)]
            mine.sum += its.sum
