"""A limit of time for Python code of others, which an exception ends from within.

Only loops and calls of Python are ended: a single operation in C, such as a huge power, is not.
"""

from __future__ import annotations

import ctypes
import threading


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
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._sent = False

    def __enter__(self) -> None:
        threading.Thread(target=self._watch, args=[threading.get_ident()], daemon=True).start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._lock:
            self._over.set()
        if self._sent and kind is not OutOfTime:
            for _count in range(1000):  # it arrives in here if it is on its way, and not later
                pass

    def _watch(self, thread: int) -> None:
        if self._over.wait(self._seconds):
            return
        with self._lock:  # once only: what comes when the block is left already would hit something else
            if not self._over.is_set():
                self._sent = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(OutOfTime))
