"""Other processes: how to stop them, and what they print when they fail."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path


def freeze(process: int, seconds: float = 60.0) -> None:
    """Stop a process, and wait until it has stopped: after the signal, threads on other CPUs may still answer."""
    os.kill(process, signal.SIGSTOP)
    deadline = time.monotonic() + seconds
    while not all(map(_stopped, Path(f"/proc/{process}/task").iterdir())):
        assert time.monotonic() < deadline, f"process {process} does not stop"
        time.sleep(0.001)


def _stopped(thread: Path) -> bool:
    return (thread / "stat").read_text().rpartition(") ")[2].startswith("T")


_HEARTBEAT = re.compile(
    r"^.*Failed to communicate with scheduler during heartbeat\.\n(?:.*\n)*?"
    r"distributed\.comm\.core\.CommClosedError: .*ConnectionPool\.heartbeat_worker.*$",
    re.MULTILINE,
)


def tracebacks(printed: str) -> list[str]:
    r"""The last lines of tracebacks in the output of processes, except those of one fault of Dask.

    A worker that closes while its heartbeat is due or in progress logs that its connections are closed (Dask 2026.7.1).

    Examples
    --------
    >>> said = "Traceback (most recent call last):\n  File ...\n    {}\n{}\n"
    >>> tracebacks(said.format("call()", "RuntimeError: ConnectionPool is closed") + said.format("f()", "KeyError: 3"))
    ['KeyError: 3']
    >>> broken = "x - ERROR - Failed to communicate with scheduler during heartbeat.\n" + said.format("f()", "Closed")
    >>> broken += said.format("", "distributed.comm.core.CommClosedError: in <TCP ConnectionPool.heartbeat_worker>")
    >>> tracebacks(broken + said.format("f()", "KeyError: 3"))
    ['KeyError: 3']
    """
    found = re.findall(r"^Traceback .*\n(?:[ \t].*\n|\n)*(.*)", _HEARTBEAT.sub("", printed), re.MULTILINE)
    return [error for error in found if error != "RuntimeError: ConnectionPool is closed"]
