"""What is on the workers' disks, and on its way there."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from distkv_dask.messages.names import SpilledFile

BYTES_PER_SECOND = 0.5e9
"""What a disk is taken to read and write before it has shown."""

KEPT = 0.7
"""Weight of what was known of the disks when one shows its speed again."""


@dataclass(slots=True)
class Copy:
    """Number of a spill, bytes of the sequence by worker, since when they are written, and the files that are there."""

    number: int
    bytes: Counter[str]
    began: float
    files: list[SpilledFile] = field(default_factory=list)
    whole: bool = False


@dataclass(slots=True)
class Disks:
    """Copies of sequences, by sequence.

    ``capacity`` and ``used`` are bytes by worker, ``rate`` bytes a second. Spills are numbered below zero, requests to
    save are not; ``numbers`` has the sequences of those that are under way.
    """

    capacity: dict[str, int] = field(default_factory=dict)
    used: Counter[str] = field(default_factory=Counter)
    copies: dict[int, Copy] = field(default_factory=dict)
    numbers: dict[int, int] = field(default_factory=dict)
    spills: int = 0
    rate: float = BYTES_PER_SECOND

    @property
    def under_way(self) -> list[int]:
        """Sequences whose blocks are being written: they are free soon."""
        return [number for number, copy in self.copies.items() if not copy.whole]

    def wrote(self, size: int, seconds: float) -> None:
        """A disk took ``size`` bytes in ``seconds``."""
        if seconds > 0:
            self.rate = KEPT * self.rate + (1 - KEPT) * size / seconds
