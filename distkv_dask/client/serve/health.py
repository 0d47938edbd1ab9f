"""``/health`` for who watches over the server, ``/metrics`` for Prometheus."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from distkv_dask.client.serve.serving import serving_of


async def health(request: Request) -> Response:
    """Status 200 as long as the engine can be asked, 503 after that: then the server has to be started again."""
    session = serving_of(request).session
    return JSONResponse({"status": session.state}, 200 if session.is_open else 503)


async def metrics(request: Request) -> Response:
    """All figures, as text."""
    return Response(serving_of(request).metrics.text(), media_type="text/plain; version=0.0.4")
