"""A limit of time for Python code of others, which an exception ends from within.

Only loops and calls of Python are ended: a single operation in C, such as a huge power, is not. One thread watches all
limits of a process, since starting one takes longer than most of what is limited.
"""

from __future__ import annotations

import ctypes
import threading
from time import monotonic

IDLE_SECONDS = 1.0
"""Time without a new limit after which nobody watches; the next limit starts a new thread."""


class OutOfTime(BaseException):
    """The time is over; no :class:`Exception`, so that the code that is ended does not catch it."""


class TimeLimit:
    """A context in which this thread gets :class:`OutOfTime` when its block takes longer.

    Parameters
    ----------
    seconds
        How long it may take.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._thread = 0
        self._is_over = False
        self.ends = 0.0
        """When the time is over, by :func:`time.monotonic`."""

    def __enter__(self) -> None:
        self._thread = threading.get_ident()
        self.ends = monotonic() + self._seconds
        _watcher.add(self)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        _watcher.remove(self)
        if self._is_over and kind is not OutOfTime:
            for _count in range(1000):  # it arrives in here if it is on its way, and not later
                pass

    def end_block(self) -> None:
        """Send its thread the exception."""
        self._is_over = True
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), ctypes.py_object(OutOfTime))


class _Watcher:
    """Ends blocks whose time is over, each once and while it runs: what comes later would hit something else.

    Threads that may get the exception any time take the plain lock, which is given back in any case.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sooner = threading.Condition(self._lock)
        self._limits: set[TimeLimit] = set()
        self._wakes = 0.0
        self._was_used = False
        self._thread: threading.Thread | None = None

    def add(self, limit: TimeLimit) -> None:
        """Watch a limit from now on."""
        with self._lock:
            if self._thread is None or not self._thread.is_alive():  # it is not where this process was forked
                self._thread = threading.Thread(target=self._watch, name="time-limits", daemon=True)
                self._thread.start()
            elif limit.ends < self._wakes:
                self._sooner.notify()
            self._was_used = True
            self._limits.add(limit)

    def remove(self, limit: TimeLimit) -> None:
        """Its block is left."""
        with self._lock:
            self._limits.discard(limit)

    def _watch(self) -> None:
        with self._lock:
            while self._limits or self._was_used:
                self._was_used = False
                now = monotonic()
                for limit in [one for one in self._limits if one.ends <= now]:
                    self._limits.remove(limit)
                    limit.end_block()
                self._wakes = min([now + IDLE_SECONDS, *(one.ends for one in self._limits)])
                self._sooner.wait(self._wakes - now)
            self._thread = None


_watcher = _Watcher()
