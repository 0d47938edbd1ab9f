"""A summary of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class BatchSummary:
    """Rows of a batch's output, how many of them are from earlier runs or have errors, and the seconds it took."""

    out: Path
    rows: int
    earlier: int
    errors: int
    seconds: float
