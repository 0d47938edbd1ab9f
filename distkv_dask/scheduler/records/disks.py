"""Contents of the workers' lower tiers (host memory of those with a card, then disks), and writes to them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from distkv_dask.messages.names import SpilledFile

BYTES_PER_SECOND = 0.5e9
"""Assumed speed of a disk until it is measured, in bytes per second."""

MEMORY_BYTES_PER_SECOND = 10e9
"""Assumed speed of copies between host memory and card until it is measured, in bytes per second."""

KEPT = 0.7
"""Weight of earlier measurements of a tier against a new one."""


@dataclass(slots=True)
class Copy:
    """Number of a spill, bytes of the sequence by worker, the start of writing, and the existing files.

    ``in_memory`` are the workers that have it in host memory; others have it on disk.
    """

    number: int
    bytes: Counter[str]
    began: float
    files: list[SpilledFile] = field(default_factory=list)
    whole: bool = False
    in_memory: set[str] = field(default_factory=set)


@dataclass(slots=True)
class Tier:
    """``capacity`` and ``used`` are bytes by worker, ``rate`` bytes a second."""

    rate: float
    capacity: dict[str, int] = field(default_factory=dict)
    used: Counter[str] = field(default_factory=Counter)

    def wrote(self, size: int, seconds: float) -> None:
        """Record a measurement: ``size`` bytes in ``seconds``."""
        if seconds > 0:
            self.rate = KEPT * self.rate + (1 - KEPT) * size / seconds

    def change(self, worker: str, size: int) -> None:
        """Change the used bytes; ignored if the worker is gone."""
        if worker in self.capacity:
            self.used[worker] += size
        if not self.used[worker]:
            del self.used[worker]

    def fits(self, worker: str, size: int) -> bool:
        """Whether this many more bytes fit now."""
        return self.used[worker] + size <= self.capacity.get(worker, 0)


@dataclass(slots=True)
class Disks:
    """Copies of sequences, by sequence, and the two tiers in which they are.

    ``numbers`` has the sequences of running spills, ``spills`` counts everything that is written for no user.
    """

    memory: Tier = field(default_factory=lambda: Tier(MEMORY_BYTES_PER_SECOND))
    disk: Tier = field(default_factory=lambda: Tier(BYTES_PER_SECOND))
    copies: dict[int, Copy] = field(default_factory=dict)
    numbers: dict[int, int] = field(default_factory=dict)
    spills: int = 0

    def add(self, worker: str, disk: int, memory: int) -> None:
        """Set the bytes that a worker has of each."""
        self.disk.capacity[worker], self.memory.capacity[worker] = disk, memory

    def remove(self, worker: str) -> None:
        """A worker is gone."""
        for tier in (self.disk, self.memory):
            tier.capacity.pop(worker, None)
            del tier.used[worker]

    def tier(self, copy: Copy, worker: str) -> Tier:
        """The tier with a worker's part of a copy."""
        return self.memory if worker in copy.in_memory else self.disk

    @property
    def under_way(self) -> list[int]:
        """Sequences whose blocks are being written and will be freed soon."""
        return [number for number, copy in self.copies.items() if not copy.whole]
