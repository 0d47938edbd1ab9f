"""The ASGI application: paths and their endpoints, behind the gate."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from distkv_dask.client.batch.openai_embeddings import EMBEDDINGS
from distkv_dask.client.batch.openai_request import CHAT, COMPLETIONS
from distkv_dask.client.serve import batches, files
from distkv_dask.client.serve.batch_queue import BatchQueue
from distkv_dask.client.serve.chat import chat
from distkv_dask.client.serve.completions import completions
from distkv_dask.client.serve.embeddings import embeddings
from distkv_dask.client.serve.failures import on_unknown, refusal_of, response_of
from distkv_dask.client.serve.gate import FILES, HEALTH, Gate
from distkv_dask.client.serve.health import health, metrics
from distkv_dask.client.serve.keys import Keys
from distkv_dask.client.serve.models import model, models
from distkv_dask.client.serve.serving import Serving
from distkv_dask.client.serve.store import Store

BATCHES = "/v1/batches"

Endpoint = Callable[[Request], Awaitable[Response]]


def _route(path: str, endpoint: Endpoint, method: str = "GET") -> Route:
    """A path whose errors all become answers; errors that pass Starlette would be logged with texts that they quote."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except Exception as error:
            return response_of(refusal_of(error))

    return Route(path, answer, methods=[method])


ROUTES = [
    _route(CHAT, chat, "POST"),
    _route(COMPLETIONS, completions, "POST"),
    _route(EMBEDDINGS, embeddings, "POST"),
    _route("/v1/models", models),
    _route("/v1/models/{name:path}", model),
    _route(FILES, files.upload, "POST"),
    _route(FILES, files.files),
    _route(f"{FILES}/{{name}}", files.file),
    _route(f"{FILES}/{{name}}", files.delete, "DELETE"),
    _route(f"{FILES}/{{name}}/content", files.content),
    _route(BATCHES, batches.create, "POST"),
    _route(BATCHES, batches.batches),
    _route(f"{BATCHES}/{{name}}", batches.batch),
    _route(f"{BATCHES}/{{name}}/cancel", batches.cancel, "POST"),
    _route(HEALTH, health),
    _route("/metrics", metrics),
]


def gate_of(serving: Serving, keys: Keys, folder: Path) -> Gate:
    """The application behind its gate.

    Parameters
    ----------
    serving
        The open engine.
    keys
        The keys that may call.
    folder
        Keeps files and batches.
    """
    queue = BatchQueue(serving, Store(folder))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        queue.start()
        yield
        await asyncio.to_thread(queue.stop)

    app = Starlette(routes=ROUTES, exception_handlers={HTTPException: on_unknown}, lifespan=lifespan)
    app.state.serving, app.state.batches = serving, queue
    return Gate(app, keys, serving.limits, serving.metrics, [route.path for route in ROUTES])
