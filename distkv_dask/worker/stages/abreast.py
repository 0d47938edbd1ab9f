"""Forwards of one gang abreast: while further stages compute one of them, the home computes another one's layers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

from distkv_dask.worker.home.lane import step_back

T = TypeVar("T")


class Abreast:
    """Threads that take turns at the home's layers, so that only one of them computes there at a time.

    A thread hands its turn on while it waits for stages (:meth:`away`). Turns are taken in the order in which they were
    asked for.

    Parameters
    ----------
    most
        Maximum number of threads.
    """

    def __init__(self, most: int) -> None:
        self._threads = ThreadPoolExecutor(most, "distkv-stages", _begin_thread, (torch.get_num_threads(),))
        self._changed = threading.Condition()
        self._asked = self._now = 0
        self._first_away: dict[int, threading.Event] = {}

    def run(self, calls: Sequence[Callable[[], T]], on_error: Callable[[BaseException], None]) -> list[T]:
        """Run calls; each begins once the one before it has handed on its first turn.

        Parameters
        ----------
        calls
            They wait for stages in :meth:`away` only.
        on_error
            Called with the first error, on any thread: it has to end the waits of the others.

        Returns
        -------
        list
            What they return.
        """
        if len(calls) == 1:
            self._take_turn()
            try:
                return [calls[0]()]
            finally:
                self._hand_on()
        begun, errors = list[Future[T]](), list[BaseException]()

        def fail(error: BaseException) -> None:
            errors.append(error)
            on_error(error)

        for call in calls:
            handed_on = threading.Event()
            begun.append(self._threads.submit(self._run, call, handed_on, fail))
            handed_on.wait()
            if errors:
                break
        wait(begun)
        if errors:
            raise errors[0]
        return [one.result() for one in begun]

    @contextmanager
    def away(self) -> Iterator[None]:
        """Hand on the turn at the home's layers inside."""
        self._hand_on()
        try:
            yield
        finally:
            self._take_turn()

    def close(self) -> None:
        """End the threads; none may run."""
        self._threads.shutdown()

    def _run(self, call: Callable[[], T], handed_on: threading.Event, fail: Callable[[BaseException], None]) -> T:
        self._first_away[threading.get_ident()] = handed_on
        self._take_turn()
        try:
            with torch.inference_mode():
                return call()
        except BaseException as error:
            fail(error)
            raise
        finally:
            self._hand_on()

    def _take_turn(self) -> None:
        with self._changed:
            mine, self._asked = self._asked, self._asked + 1
            self._changed.wait_for(lambda: self._now == mine)

    def _hand_on(self) -> None:
        with self._changed:
            self._now += 1
            self._changed.notify_all()
        if (handed_on := self._first_away.pop(threading.get_ident(), None)) is not None:
            handed_on.set()


def _begin_thread(threads: int) -> None:
    torch.set_num_threads(threads)
    step_back()
