"""A request for its user: a future of a completion, and a stream of text."""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import NamedTuple, Self

from distkv_dask.completion import Completion, Timings
from distkv_dask.errors import InvalidRequestError, ResultTimeoutError
from distkv_dask.logprobs import TokenLogprob
from distkv_dask.sampling import SamplingParams


class Generation(concurrent.futures.Future[Completion]):
    """Future of a :class:`~distkv_dask.completion.Completion`, with the semantics of :mod:`concurrent.futures`.

    It can also be awaited. ``cancel`` stops the request on the cluster and frees its KV cache.
    """

    def __init__(self, cancel: Callable[[], None]) -> None:
        super().__init__()
        self.timings = Timings()
        """The partial completion of a request that failed."""
        self._cancel_request = cancel

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the completion, but not longer than ``timeout`` seconds.

        Raises
        ------
        ResultTimeoutError
            When it takes longer; the request continues.
        DistKVError
            When the request fails.
        """
        try:
            return super().result(timeout)
        except TimeoutError:
            self._check_ended(timeout)
            raise

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait as :meth:`result` does and return the request's error, or None if it succeeded."""
        try:
            return super().exception(timeout)
        except TimeoutError:
            self._check_ended(timeout)
            raise

    def _check_ended(self, timeout: float | None) -> None:
        if not self.done():
            raise ResultTimeoutError(
                f"the request was not answered within the {timeout:g} s of this call, and continues: wait longer or "
                "cancel() it; engine.status() says where it is"
            ) from None

    def cancel(self) -> bool:
        """Stop the request; returns True unless the request had already ended."""
        cancelled = super().cancel()
        if cancelled:
            self._cancel_request()
        return cancelled

    def __await__(self) -> Generator[object, None, Completion]:
        """Wait for the completion in a coroutine."""
        return asyncio.wrap_future(self).__await__()


class Piece(NamedTuple):
    """A piece of an answer, as it is generated.

    ``logprobs`` are those of the tokens whose text ends in this piece, if they were requested. ``branch`` says to which
    of several answers to the prompt it belongs.
    """

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    branch: int = 0


class TextPieces:
    """Text of one request as it is generated: iterate with ``for`` or ``async for``, as often as you like.

    Leaving the loop early does not stop the request, but ``close`` (or a ``with`` block) does. ``completion`` is set
    after the last piece.
    """

    def __init__(self) -> None:
        self.completion: Completion | None = None
        self._pieces: list[str | None] = []
        self._waiting: list[concurrent.futures.Future[None]] = []
        self._lock = threading.Lock()

    @classmethod
    def of(cls, sampling: SamplingParams | None) -> Self:
        """The text of a request with one answer; raises InvalidRequestError for several answers, or none."""
        if isinstance(sampling, SamplingParams) and sampling.embed is not None:
            raise InvalidRequestError("an embedding is not read as it is generated: use submit, or leave out embed")
        if isinstance(sampling, SamplingParams) and (sampling.n > 1 or sampling.best_of is not None):
            raise InvalidRequestError("one answer can be read as it is generated, not several: leave out n and best_of")
        return cls()

    def follow(self, generation: Generation) -> Self:
        """End with this request."""
        self._generation = generation
        generation.add_done_callback(lambda _: self.put(None))
        return self

    def put(self, piece: Piece | None) -> None:
        """Add a piece; None ends the stream. Called by the engine."""
        with self._lock:
            self._pieces.append(None if piece is None else piece.text)
            waiting, self._waiting = self._waiting, []
        for one in waiting:
            one.set_result(None)

    def _arrival(self, number: int) -> concurrent.futures.Future[None]:
        """Future that is done when piece ``number`` has arrived."""
        arrival: concurrent.futures.Future[None] = concurrent.futures.Future()
        arrival.set_running_or_notify_cancel()
        with self._lock:
            if number >= len(self._pieces):
                self._waiting.append(arrival)
                return arrival
        arrival.set_result(None)
        return arrival

    def close(self) -> None:
        """Stop the request unless it has already ended."""
        self._generation.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        for number in itertools.count():
            self._arrival(number).result()
            if (piece := self._pieces[number]) is None:
                break
            yield piece
        self.completion = self._generation.result()

    async def __aiter__(self) -> AsyncIterator[str]:
        for number in itertools.count():
            await asyncio.wrap_future(self._arrival(number))
            if (piece := self._pieces[number]) is None:
                break
            yield piece
        self.completion = await self._generation
