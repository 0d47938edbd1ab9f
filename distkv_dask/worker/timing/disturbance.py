"""Whether other processes use this machine's processors, which makes timings unreliable."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

MOST = 0.1
"""Maximum part of the time that a thread may wait for a processor while it is timed."""

QUIET = 0.5
"""Load of a processor below which the machine is quiet enough to time it again."""

THREADS = Path("/proc/self/task")


@dataclass(slots=True)
class Disturbance:
    """The longest wait of a thread of this process for a processor, as a part of the time; 0 if not known."""

    waited: float = 0.0


@contextmanager
def disturbance() -> Iterator[Disturbance]:
    """Measure how long threads that exist throughout a ``with`` statement wait in it (on Linux)."""
    found, before, began = Disturbance(), _waited(), time.perf_counter()
    yield found
    seconds = time.perf_counter() - began
    more = (waited - before[thread] for thread, waited in _waited().items() if thread in before)
    found.waited = max(more, default=0.0) / seconds


def is_quiet() -> bool:
    """Whether the processors' load was low in the last minute, as far as the system reports it."""
    try:
        return os.getloadavg()[0] < QUIET * (os.cpu_count() or 1)
    except OSError:
        return True


def _waited() -> dict[str, float]:
    """Seconds that each thread of this process was ready but did not run."""
    waited: dict[str, float] = {}
    for file in THREADS.glob("*/schedstat"):  # none on other systems
        with suppress(OSError):  # it has just ended
            waited[file.parent.name] = int(file.read_text().split()[1]) / 1e9
    return waited
