"""Other processes, made to behave as on a bad day."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def freeze(process: int, seconds: float = 60.0) -> None:
    """Stop a process, and wait until it has: the signal returns while threads on other CPUs still answer."""
    os.kill(process, signal.SIGSTOP)
    deadline = time.monotonic() + seconds
    while not all(map(_stopped, Path(f"/proc/{process}/task").iterdir())):
        assert time.monotonic() < deadline, f"process {process} does not stop"
        time.sleep(0.001)


def _stopped(thread: Path) -> bool:
    return (thread / "stat").read_text().rpartition(") ")[2].startswith("T")
