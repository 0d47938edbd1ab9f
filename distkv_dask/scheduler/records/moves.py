"""Running moves: at most one for each sequence, source and target."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from distkv_dask.placement import Move, Placement
from distkv_dask.scheduler.ledger.placements import moved


@dataclass(slots=True)
class UnderWay:
    """A running move; ``late`` is its deadline.

    With a pause, ``computing`` are the workers that may still compute on the sequence. ``handed`` is the number under
    which its home writes its state, 0 if it has none.
    """

    number: int
    move: Move
    pauses: bool
    late: float
    phase: Literal["expecting", "pausing", "sending", "writing", "reading", "switching", "resuming"] = "expecting"
    computing: list[str] = field(default_factory=list)
    handed: int = 0


@dataclass(slots=True)
class Moves:
    """Moves of one engine, by number.

    ``step_seconds`` is the time of a decode step of each home, ``moved_blocks`` the number of blocks moved so far.
    ``handed`` has, by move, the worker with the files in which a home wrote its state, and their names.
    """

    under_way: dict[int, UnderWay] = field(default_factory=dict)
    handed: dict[int, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    step_seconds: dict[str, float] = field(default_factory=dict)
    moved_blocks: int = 0

    def busy(self, worker: str) -> bool:
        """Whether a worker sends or receives blocks."""
        return any(worker in (one.move.source, one.move.target) for one in self.under_way.values())

    def of(self, sequence: int) -> list[UnderWay]:
        """The moves of a sequence's blocks."""
        return [one for one in self.under_way.values() if one.move.sequence == sequence]

    def placement(self, sequence: int, placement: Placement, block_tokens: int) -> Placement:
        """The placement that a sequence's home uses: the ledger's, or the one it switches to."""
        for one in self.of(sequence):
            if one.phase == "switching":
                return moved(placement, one.move, block_tokens)
        return placement

    def end(self, sequence: int) -> None:
        """A sequence ended; its blocks are released at the target, too, which then refuses further pieces."""
        for one in self.of(sequence):
            del self.under_way[one.number]
