"""What a batch did, in figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class BatchSummary:
    """What a batch did: rows of the output, how many were there before, how many have errors, and seconds it took."""

    out: Path
    rows: int
    earlier: int
    errors: int
    seconds: float
