"""Blocking work on files that may hang (a network disk, an object store): watched, and abandoned without progress.

A thread that hangs in the kernel cannot be ended. So such work gets its own daemon thread, which blocks no thread pool
and keeps no process alive; it reports its progress, and before it changes anything it checks whether its caller still
waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from distkv_dask.errors import SavedDocumentError

Result = TypeVar("Result")


class Watch:
    """Shared by work and its waiting caller; work without a limit gets one that is never abandoned."""

    def __init__(self) -> None:
        self.seen = time.monotonic()
        """When the work last showed progress."""
        self._given_up = False
        self._lock = threading.Lock()

    def step(self) -> None:
        """Show progress; raises :class:`TimeoutError` if the caller no longer waits."""
        self.check()
        self.seen = time.monotonic()

    def check(self) -> None:
        """Raise :class:`TimeoutError` if the caller no longer waits."""
        if self._given_up:
            raise TimeoutError("it took too long, and its caller no longer waits")

    @contextlib.contextmanager
    def change(self) -> Iterator[None]:
        """Do a short change of shared data; impossible once the work was abandoned."""
        with self._lock:
            self.step()
            yield

    def give_up(self) -> None:
        """Wait no more."""
        with self._lock:
            self._given_up = True


async def watched(limit: float, what: str, work: Callable[..., Result], *arguments: Any) -> Result:
    """Do blocking ``work(watch, *arguments)`` in its own thread, and return its result.

    Raises
    ------
    SavedDocumentError
        It showed no progress for ``limit`` seconds; the message begins with ``what`` is done.
    """
    loop, watch = asyncio.get_running_loop(), Watch()
    ended: asyncio.Future[Result] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if ended.done():
            return
        if error is None:
            ended.set_result(result)
        else:
            ended.set_exception(error)

    def run() -> None:
        result, failure = None, None
        try:
            result = work(watch, *arguments)
        except BaseException as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the event loop was closed in the meantime
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, daemon=True, name="distkv-files").start()
    try:
        while not ended.done():
            left = watch.seen + limit - time.monotonic()
            if left <= 0:
                raise SavedDocumentError(
                    f"{what} stood still for {limit:g} s (distkv.timeouts.files): check that the disk or service "
                    "answers, or raise the limit if it is only slow"
                )
            await asyncio.wait([ended], timeout=left)
        return ended.result()
    finally:
        watch.give_up()
        ended.cancel()
