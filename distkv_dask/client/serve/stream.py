"""Answers as server-sent events, while they are generated."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from time import perf_counter
from typing import Any

from starlette.responses import Response, StreamingResponse

from distkv_dask.client.serve.asked import Asked
from distkv_dask.client.serve.failures import body_of, refusal_of
from distkv_dask.client.serve.form import Form
from distkv_dask.client.serve.serving import Serving
from distkv_dask.client.serve.submission import result_of, submit_prompts
from distkv_dask.client.session.generation import Generation, Piece

REFUSED_SECONDS = 1.0
"""Seconds to wait for a refusal by the cluster; after that a stream begins, with status 200."""

PAUSE_SECONDS = 15.0
"""Seconds without text after which a stream gets a comment: proxies and clients close silent connections."""

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Headers that keep proxies from buffering a stream."""

News = tuple[int, Piece | Generation] | None
"""The number of a choice and a piece of it, or of a prompt and its request, which has ended; None: a time-out."""


class Pieces:
    """A queue of what a call's requests produce: put from any thread, taken on the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[News] = asyncio.Queue()

    def put(self, number: int, one: Piece | Generation) -> None:
        """Add a piece of a choice, or the end of a prompt's answers."""
        with contextlib.suppress(RuntimeError):  # the server has ended, and its loop is closed
            self._loop.call_soon_threadsafe(self._news.put_nowait, (number, one))

    async def next_within(self, seconds: float) -> News:
        """The next one; None after ``seconds`` without one."""
        try:
            async with asyncio.timeout(seconds):
                return await self._news.get()
        except TimeoutError:
            return None


async def streamed(asked: Asked, form: Form, serving: Serving, gone: asyncio.Task[None]) -> Response:
    """Begin a stream, once the cluster has accepted the request."""
    pieces = Pieces()
    generations = submit_prompts(asked, serving, gone, pieces.put)
    for at, generation in enumerate(generations):
        generation.add_done_callback(lambda one, at=at: pieces.put(at, one))  # type: ignore[misc]
    try:
        first = await pieces.next_within(REFUSED_SECONDS)
        if first is not None and isinstance(first[1], Generation):
            result_of(first[1])  # a refusal is an answer with its own status
    except BaseException:
        gone.cancel()  # also cancels the requests
        raise
    events = _events(asked, form, serving, _news(first, pieces, len(generations)))
    return StreamingResponse(_until_gone(events, gone), media_type="text/event-stream", headers=_HEADERS)


async def _news(first: News, pieces: Pieces, left: int) -> AsyncGenerator[News]:
    """All news until ``left`` requests have ended."""
    news = first
    while True:
        yield news
        left -= news is not None and isinstance(news[1], Generation)
        if not left:
            return
        news = await pieces.next_within(PAUSE_SECONDS)


async def _events(asked: Asked, form: Form, serving: Serving, news: AsyncGenerator[News]) -> AsyncGenerator[bytes]:
    """The events of a stream; an error in the middle is the last one."""
    more: dict[str, Any] = {"usage": None} if asked.usage else {}
    done, began, waits = {}, perf_counter(), True
    try:
        for begun in _beginnings(form, len(asked.prompts) * asked.choices):
            yield _event(begun | more)
        async for one in news:
            if one is None:
                yield b": still here\n\n"
                continue
            number, what = one
            if isinstance(what, Piece):
                if waits:
                    waits = False
                    serving.metrics.first.observe(perf_counter() - began)
                yield _event(form.piece(number, what) | more)
                continue
            done[number] = result_of(what)
            for at, answer in enumerate(done[number].answers, number * asked.choices):
                yield _event(form.last(at, answer) | more)
    except Exception as error:
        yield _event(body_of(refusal_of(error)))
        return
    for whole in done.values():
        serving.metrics.answered(whole)
    if asked.usage:
        yield _event(form.usage([*done.values()]))
    yield b"data: [DONE]\n\n"


def _beginnings(form: Form, choices: int) -> Sequence[dict[str, Any]]:
    found = (form.first(index) for index in range(choices))
    return [one for one in found if one is not None]


async def _until_gone(events: AsyncGenerator[bytes], gone: asyncio.Task[None]) -> AsyncGenerator[bytes]:
    """The same events; when the client stops reading, the requests are cancelled."""
    try:
        async for event in events:
            yield event
    finally:
        gone.cancel()


def _event(data: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"
