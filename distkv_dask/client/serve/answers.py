"""Answers one call, whole or as a stream, and cancels it when the client disconnects."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from distkv_dask.client.serve.asked import Asked, read_asked
from distkv_dask.client.serve.body import read_json
from distkv_dask.client.serve.form import Form
from distkv_dask.client.serve.serving import Serving, serving_of
from distkv_dask.client.serve.stream import streamed
from distkv_dask.client.serve.submission import result_of, submit_prompts
from distkv_dask.client.session.generation import Generation
from distkv_dask.client.tokenizer import Tokenizer
from distkv_dask.completion import Completion

Written = Callable[[Sequence[Completion]], dict[str, Any]]

GONE = 499
"""The usual status for a client that has disconnected; only logs and metrics show it."""


async def answered(request: Request, url: str, form_of: Callable[[str, Tokenizer], Form]) -> Response:
    """Answer a request that came to the path ``url``; raises :class:`DistKVError` if it is refused.

    ``form_of`` takes the model's name in answers, and its tokenizer.
    """
    serving = serving_of(request)
    asked = await read_asked(await read_json(request), url, serving)
    form = form_of(asked.model, serving.session.tokenizer)
    gone = until_gone(request)
    if asked.stream:
        return await streamed(asked, form, serving, gone)
    return await whole(asked, form.whole, serving, gone)


def until_gone(request: Request) -> asyncio.Task[None]:
    """A task that ends when the client is gone."""
    return asyncio.create_task(_gone(request))


async def _gone(request: Request) -> None:
    """Return when the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def whole(asked: Asked, write: Written, serving: Serving, gone: asyncio.Task[None]) -> Response:
    """Answer all prompts of a call, and write the answers as one object.

    Parameters
    ----------
    asked, serving, gone
        As :func:`~distkv_dask.client.serve.submission.submit_prompts` takes them.
    write
        Writes the answers, in the order of the prompts.

    Raises
    ------
    DistKVError
        When one of them fails; the others are cancelled.
    """
    loop, ends = asyncio.get_running_loop(), asyncio.Queue[Generation]()

    def end(generation: Generation) -> None:
        with contextlib.suppress(RuntimeError):  # the server has ended, and its loop is closed
            loop.call_soon_threadsafe(ends.put_nowait, generation)

    generations = submit_prompts(asked, serving, gone)
    for generation in generations:
        generation.add_done_callback(end)  # type: ignore[arg-type]  # it is called with this very future
    try:
        for _ in generations:
            ended = await ends.get()
            if gone.done() and ended.cancelled():
                return Response(status_code=GONE)
            result_of(ended)
    finally:
        gone.cancel()  # also cancels requests that have not ended
    done = [result_of(one) for one in generations]
    for one in done:
        serving.metrics.answered(one)
    return JSONResponse(write(done))
