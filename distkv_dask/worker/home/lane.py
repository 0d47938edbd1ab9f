"""The home lane: one thread that runs model forwards and waits for partials, in the order they were submitted.

A call that only has to run after the current one goes before those that wait.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, ParamSpec, TypeVar

import torch

from distkv_dask.errors import EngineClosedError
from distkv_dask.worker.guard import run_lane

P = ParamSpec("P")
T = TypeVar("T")
NICENESS = 10
"""Niceness of the lane, below the holder lane of the same process, which other homes wait for.

On a busy machine the 99th percentile of a holder's round trip next to a lane that multiplies matrices was 3.5, 2.8 and
0.6 ms at niceness 0, 5 and 10 on two cores, and 2.5, 0.3 and 0.3 ms on one core, where the lane got 185, 124 and 96
rounds done per second. Other programs disturbed this: next to an idle lane it was 2.3 and 1.6 ms. This does not prove
that 5 is worse than 10; measure again on a quiet machine before changing this.
"""


class HomeLane:
    """FIFO thread for homes' work.

    Parameters
    ----------
    threads
        torch threads of an operation.
    on_end
        Called with the reason, on the lane's thread, when the lane ends without :meth:`close`.
    """

    def __init__(self, threads: int, on_end: Callable[[str], None] = lambda reason: None) -> None:
        self._threads = threads
        self._on_end = on_end
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="distkv-home-lane", daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        """Whether the lane was closed or has ended by itself."""
        return self._closed

    def submit(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run ``call`` after everything that was submitted before.

        Raises
        ------
        EngineClosedError
            The lane is closed.
        """
        return self._put(partial(call, *args, **kwargs), self._calls.append)

    def submit_next(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run ``call`` as soon as the present call has ended, before all that wait.

        Raises
        ------
        EngineClosedError
            The lane is closed.
        """
        return self._put(partial(call, *args, **kwargs), self._calls.appendleft)

    def _put(self, call: Callable[[], T], put: Callable[[tuple[Future[Any], Callable[[], Any]]], None]) -> Future[T]:
        future: Future[T] = Future()
        with self._wake:
            if self._closed:
                raise EngineClosedError("this worker's home lane is closed; start a new engine")
            put((future, call))
            self._wake.notify()
        return future

    def close(self, timeout: float = 10.0) -> None:
        """End the thread after its present call; later ones are cancelled. Can be called again.

        Raises
        ------
        TimeoutError
            The present call does not end within ``timeout`` seconds.
        """
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"the home lane is still at work after {timeout:g} s; abort its gang first")

    def _run(self) -> None:
        try:
            run_lane("home lane", self._work, self._end)
        finally:
            self._shut()

    def _work(self) -> None:
        torch.set_num_threads(self._threads)
        step_back()
        while (item := self._next_call()) is not None:
            future, call = item
            if self._closed:
                future.cancel()
            if future.set_running_or_notify_cancel():
                _complete(future, call)
            del item, future, call

    def _end(self, reason: str) -> None:
        """The lane ends because of an error: report it before its calls fail, so that they are not retried here."""
        with self._wake:
            self._closed = True
        self._on_end(reason)

    def _shut(self) -> None:
        with self._wake:
            self._closed = True
            left = [future for future, _ in self._calls]
            self._calls.clear()
        for future in left:
            if future.set_running_or_notify_cancel():
                future.set_exception(EngineClosedError("this worker's home lane has ended"))

    def _next_call(self) -> tuple[Future[Any], Callable[[], Any]] | None:
        """The next call, as soon as there is one; None when the lane is closed and none is left."""
        with self._wake:
            self._wake.wait_for(lambda: self._calls or self._closed)
            return self._calls.popleft() if self._calls else None


def _complete(future: Future[Any], call: Callable[[], Any]) -> None:
    """Call, and give a future the result or the error."""
    try:
        result = call()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)


def step_back() -> None:
    """Lower the calling thread's priority where the system can do so for one thread (Linux)."""
    setpriority: Any = getattr(os, "setpriority", None)
    if setpriority is not None and hasattr(os, "sched_getaffinity"):
        with contextlib.suppress(OSError):
            setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
