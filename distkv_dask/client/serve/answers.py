"""One request to the engine on behalf of a client: whole or as a stream, and cancelled when the client is gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from distkv_dask.client.batch.openai_request import body_content
from distkv_dask.client.batch.rows import Content
from distkv_dask.client.serve.body import read_json
from distkv_dask.client.serve.failures import Refusal, body_of, refusal_of
from distkv_dask.client.serve.serving import Serving, serving_of
from distkv_dask.client.session.generation import Generation
from distkv_dask.client.session.request import checked
from distkv_dask.completion import Completion
from distkv_dask.errors import InvalidRequestError
from distkv_dask.sampling import SamplingParams

REFUSED_SECONDS = 1.0
"""Time in which a request that the cluster refuses is known: a stream begins later, and then with status 200."""

PAUSE_SECONDS = 15.0
"""Time without text after which a stream gets a comment: proxies and clients end connections that say nothing."""

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""No proxy keeps a stream back."""

GONE = 499
"""Status for a client that is gone, as others have it; nobody sees it but logs and metrics."""


class Form(Protocol):
    """How one endpoint writes answers: OpenAI has different objects for chats and for completions."""

    def whole(self, done: Completion) -> dict[str, Any]:
        """An answer as one object."""

    def first(self) -> dict[str, Any] | None:
        """What a stream begins with, if with anything."""

    def piece(self, text: str) -> dict[str, Any]:
        """A piece of a stream."""

    def last(self, done: Completion) -> dict[str, Any]:
        """The end of a stream, with its reason."""

    def usage(self, done: Completion) -> dict[str, Any]:
        """The tokens of a stream, which follow its end."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks: a prompt's token ids, how to draw, whether to stream, and to count tokens in the stream."""

    ids: list[int]
    sampling: SamplingParams
    stream: bool
    usage: bool


async def answered(request: Request, url: str, form: Form) -> Response:
    """Answer a request that came to the path ``url``; raises :class:`DistKVError` where it is refused."""
    serving = serving_of(request)
    asked = await _asked(await read_json(request), url, serving)
    gone = asyncio.create_task(_gone(request))
    if asked.stream:
        return await _streamed(asked, form, serving, gone)
    return await _whole(asked, form, serving, gone)


def usage_of(done: Completion) -> dict[str, Any]:
    """OpenAI's count of tokens."""
    new = sum(len(one.token_ids) for one in done.answers)
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": new,
        "total_tokens": done.prompt_tokens + new,
        "prompt_tokens_details": {"cached_tokens": done.reused_tokens},
    }


async def _asked(body: Mapping[str, Any], url: str, serving: Serving) -> Asked:
    """Read a request; what is not done is refused by name."""
    said = dict(body)
    serving.check_name(said.pop("model", None))
    stream, options = said.pop("stream", None), said.pop("stream_options", None)
    if not isinstance(stream, bool | None):
        raise InvalidRequestError(f"stream is {stream!r:.100}, but must be true or false")
    content = body_content(said, url)
    usage = _usage(options, bool(stream))
    asked = Asked(*await asyncio.to_thread(_checked, content, serving), bool(stream), usage)
    check_written(asked.sampling, asked.stream)
    return asked


def check_written(sampling: SamplingParams, stream: bool) -> None:
    """Refuse what answers of this API would leave out.

    Raises
    ------
    InvalidRequestError
        When more than a text of a stream is asked for.
    """
    for name in ("logprobs", "prompt_logprobs", "choices", "n", "best_of") if stream else ():
        if getattr(sampling, name) not in (None, 1):
            raise InvalidRequestError(f"{name} is not supported in a stream: leave it out or stream")


def _checked(content: Content, serving: Serving) -> tuple[list[int], SamplingParams]:
    """What may take long for a long prompt or a large schema, and is not done on the event loop."""
    tokenizer = serving.session.tokenizer
    if content.template:
        tokenizer = tokenizer.with_variables(content.template)
    assert content.prompt is not None
    ids = tokenizer.encode(content.prompt)
    sampling = serving.sampling(content.sampling, len(ids))
    return ids, checked(sampling, len(ids), serving.session.facts["max_positions"])


def _usage(options: Any, stream: bool) -> bool:
    """Whether a stream is to end with a count of tokens."""
    if options is None:
        return False
    if not stream:
        raise InvalidRequestError("stream_options are for streams: leave them out, or add stream=true")
    match options:
        case {"include_usage": bool(usage), **others} if others in ({}, {"include_obfuscation": False}):
            return usage
    raise InvalidRequestError(f"stream_options={options!r:.100} are not supported: they may have include_usage")


async def _gone(request: Request) -> None:
    """Return when the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _whole(asked: Asked, form: Form, serving: Serving, gone: asyncio.Task[None]) -> Response:
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def end(_: object) -> None:
        with contextlib.suppress(RuntimeError):  # the server has ended, and its loop is closed
            loop.call_soon_threadsafe(ended.set)

    try:
        generation = serving.session.ask_ids(asked.ids, asked.sampling)
        serving.watch(generation)
        gone.add_done_callback(lambda _: generation.cancel())
        generation.add_done_callback(end)
        await ended.wait()
    finally:
        left = gone.done()
        gone.cancel()  # and with it the request, unless it has ended
    if left and generation.cancelled():
        return Response(status_code=GONE)
    done = _result(generation)
    serving.metrics.answered(done)
    return JSONResponse(form.whole(done))


async def _streamed(asked: Asked, form: Form, serving: Serving, gone: asyncio.Task[None]) -> Response:
    """Begin a stream, once it is known that the cluster takes the request."""
    loop, texts = asyncio.get_running_loop(), asyncio.Queue[str | None]()

    def put(text: str | None) -> None:
        with contextlib.suppress(RuntimeError):  # the server has ended, and its loop is closed
            loop.call_soon_threadsafe(texts.put_nowait, text)

    try:
        generation = serving.session.ask_ids(asked.ids, asked.sampling, put)
    except BaseException:
        gone.cancel()
        raise
    generation.add_done_callback(lambda _: put(None))
    serving.watch(generation)
    gone.add_done_callback(lambda _: generation.cancel())
    try:
        first = await _next(texts, REFUSED_SECONDS)
        if first is None:
            _result(generation)  # a refusal is an answer with a status of its own
    except BaseException:
        gone.cancel()  # and with it the request
        raise
    events = _events(asked, form, serving, _texts(first, texts), generation)
    return StreamingResponse(_until_gone(events, gone), media_type="text/event-stream", headers=_HEADERS)


async def _next(texts: asyncio.Queue[str | None], seconds: float) -> str | None:
    """The next text; an empty one when none has come for so long, None at the end."""
    try:
        async with asyncio.timeout(seconds):
            return await texts.get()
    except TimeoutError:
        return ""


async def _texts(first: str | None, texts: asyncio.Queue[str | None]) -> AsyncGenerator[str]:
    text = first
    while text is not None:
        yield text
        text = await _next(texts, PAUSE_SECONDS)


async def _events(
    asked: Asked, form: Form, serving: Serving, texts: AsyncGenerator[str], generation: Generation
) -> AsyncGenerator[bytes]:
    """The events of a stream; an error in the middle of it is its last one."""
    began, waits = perf_counter(), True
    try:
        if (first := form.first()) is not None:
            yield _event(first)
        async for text in texts:
            if text and waits:
                waits = False
                serving.metrics.first.observe(perf_counter() - began)
            yield _event(form.piece(text)) if text else b": still here\n\n"
        done = _result(generation)
    except Exception as error:
        yield _event(body_of(refusal_of(error)))
        return
    serving.metrics.answered(done)
    yield _event(form.last(done))
    if asked.usage:
        yield _event(form.usage(done))
    yield b"data: [DONE]\n\n"


async def _until_gone(events: AsyncGenerator[bytes], gone: asyncio.Task[None]) -> AsyncGenerator[bytes]:
    """The same events; when nobody takes them any more, the request is cancelled."""
    try:
        async for event in events:
            yield event
    finally:
        gone.cancel()


def _result(generation: Generation) -> Completion:
    """The completion of a request that has ended.

    Raises
    ------
    DistKVError
        When it failed, or was cancelled because the server stops.
    """
    if generation.cancelled():
        raise Refusal("the server stopped before the answer was complete", 503, "stopping", 1)
    return generation.result()


def _event(data: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"
