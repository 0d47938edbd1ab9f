"""The outcome of a simulation: times of each request, and how full the workers were."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from distkv_dask.simulate.traces import Arrival


@dataclass(slots=True, eq=False)
class Run:
    """A request in the simulation, and when it first had room and its first token, in seconds."""

    number: int
    arrival: Arrival
    admitted: float = math.inf
    first: float = math.inf


@dataclass(slots=True)
class Outcome:
    """The outcome: finished runs with their end times, arrivals that were not served, moved blocks, memory."""

    policy: str
    workers: int
    finished: list[tuple[Run, float]] = field(default_factory=list)
    refused: list[Arrival] = field(default_factory=list)
    """Requests that were refused on arrival, or ended after workers were lost."""
    moved_blocks: int = 0
    seconds: float = 0.0
    memory: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    """Times, and the fraction of its pool that each worker uses at that time (without lost workers)."""
