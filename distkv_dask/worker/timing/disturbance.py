"""Whether others use this machine's processors, so that what is timed just now says little about later."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

MOST = 0.1
"""Part of the time for which a thread may wait for a processor while it is timed."""

QUIET = 0.5
"""Load of a processor below which the machine is quiet enough to time it again."""

THREADS = Path("/proc/self/task")


@dataclass(slots=True)
class Disturbance:
    """How long a thread of this process waited for a processor, as a part of the time, at most: 0 where not known."""

    waited: float = 0.0


@contextmanager
def disturbance() -> Iterator[Disturbance]:
    """Find, at the end of a ``with`` statement, how long the threads waited that lived all the while (on Linux)."""
    found, before, began = Disturbance(), _waited(), time.perf_counter()
    yield found
    seconds = time.perf_counter() - began
    more = (waited - before[thread] for thread, waited in _waited().items() if thread in before)
    found.waited = max(more, default=0.0) / seconds


def is_quiet() -> bool:
    """Whether processors had little to do in the last minute, as far as the system says."""
    try:
        return os.getloadavg()[0] < QUIET * (os.cpu_count() or 1)
    except OSError:
        return True


def _waited() -> dict[str, float]:
    """Seconds that each thread of this process was ready to run and did not."""
    waited: dict[str, float] = {}
    for file in THREADS.glob("*/schedstat"):  # none on other systems
        with suppress(OSError):  # it has just ended
            waited[file.parent.name] = int(file.read_text().split()[1]) / 1e9
    return waited
