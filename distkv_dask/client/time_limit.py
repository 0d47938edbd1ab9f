"""A time limit for others' Python code, which is ended by an exception raised within it.

Only Python's loops and calls are ended: a single operation in C, such as a huge power, is not. One thread watches all
limits of a process, because starting a thread takes longer than most limited code.
"""

from __future__ import annotations

import ctypes
import threading
from time import monotonic

IDLE_SECONDS = 1.0
"""Seconds without a new limit after which the watching thread ends; the next limit starts a new one."""


class OutOfTime(BaseException):
    """The time is up; not an :class:`Exception`, so that the limited code does not catch it."""


class TimeLimit:
    """A context that raises :class:`OutOfTime` in this thread when its block takes longer.

    Parameters
    ----------
    seconds
        The limit.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._thread = 0
        self._is_over = False
        self.ends = 0.0
        """The deadline, by :func:`time.monotonic`."""

    def __enter__(self) -> None:
        self._thread = threading.get_ident()
        self.ends = monotonic() + self._seconds
        _watcher.add(self)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        _watcher.remove(self)
        if self._is_over and kind is not OutOfTime:
            for _count in range(1000):  # a pending exception arrives here, and not later
                pass

    def end_block(self) -> None:
        """Send its thread the exception."""
        self._is_over = True
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), ctypes.py_object(OutOfTime))


class _Watcher:
    """Ends blocks after their deadline, each once and while it runs: a late exception would hit other code.

    Threads that may get the exception at any time use the plain lock, which is always released.
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
            if self._thread is None or not self._thread.is_alive():  # a forked process does not have the thread
                self._thread = threading.Thread(target=self._watch, name="time-limits", daemon=True)
                self._thread.start()
            elif limit.ends < self._wakes:
                self._sooner.notify()
            self._was_used = True
            self._limits.add(limit)

    def remove(self, limit: TimeLimit) -> None:
        """Its block has ended."""
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
