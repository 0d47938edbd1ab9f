"""A request as its user holds it: a future of a completion, and a stream of text."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import queue
from collections.abc import AsyncIterator, Callable, Generator, Iterator

from distkv_dask.types import Completion


class Generation(concurrent.futures.Future[Completion]):
    """Future of a :class:`~distkv_dask.types.Completion`, with the semantics of :mod:`concurrent.futures`.

    It can also be awaited. ``cancel`` stops the request on the cluster and frees its KV cache.
    """

    def __init__(self, cancel: Callable[[], None]) -> None:
        super().__init__()
        self._cancel_request = cancel

    def cancel(self) -> bool:
        """Stop the request; True unless it had ended."""
        cancelled = super().cancel()
        if cancelled:
            self._cancel_request()
        return cancelled

    def __await__(self) -> Generator[object, None, Completion]:
        """Wait for the completion in a coroutine."""
        return asyncio.wrap_future(self).__await__()


class TextPieces:
    """Text of one request as it is generated: iterate with ``for`` or ``async for``.

    Leaving the loop early does not stop the request; ``close`` (or a ``with`` block) does. After the last piece
    ``completion`` is set.
    """

    def __init__(self, generation: Generation, loop: asyncio.AbstractEventLoop) -> None:
        self._generation = generation
        self._loop = loop
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._arrived = asyncio.Event()
        self.completion: Completion | None = None
        generation.add_done_callback(lambda _: self.put(None))

    def put(self, piece: str | None) -> None:
        """Add a piece; None ends the stream. Called by the engine."""
        self._pieces.put(piece)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody can be waiting in it
            self._loop.call_soon_threadsafe(self._arrived.set)

    def close(self) -> None:
        """Stop the request if it has not ended."""
        self._generation.cancel()

    def __enter__(self) -> TextPieces:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        while (piece := self._pieces.get()) is not None:
            yield piece
        self.completion = self._generation.result()

    async def __aiter__(self) -> AsyncIterator[str]:
        while True:
            while self._pieces.empty():
                await self._arrived.wait()
                self._arrived.clear()
            piece = self._pieces.get_nowait()
            if piece is None:
                break
            yield piece
        self.completion = await self._generation
