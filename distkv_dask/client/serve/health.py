"""``/health`` for monitoring, ``/metrics`` for Prometheus."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from distkv_dask.client.serve.serving import serving_of


async def health(request: Request) -> Response:
    """Status 200 while the engine can be used, 503 after that: then the server has to be restarted."""
    session = serving_of(request).session
    return JSONResponse({"status": session.state}, 200 if session.is_open else 503)


async def metrics(request: Request) -> Response:
    """All figures, as text."""
    return Response(serving_of(request).metrics.text(), media_type="text/plain; version=0.0.4")
