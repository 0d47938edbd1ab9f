"""``/v1/models``: the one model that is served, under each of its names, and its adapters."""

from __future__ import annotations

import math
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from distkv_dask.client.serve.serving import Serving, serving_of


async def models(request: Request) -> Response:
    """List the model's names, and those of adapters."""
    serving = serving_of(request)
    names = *serving.names, *serving.adapters
    return JSONResponse({"object": "list", "data": [_model(serving, name) for name in names]})


async def model(request: Request) -> Response:
    """One of them."""
    serving, name = serving_of(request), request.path_params["name"]
    serving.check_name(name)
    return JSONResponse(_model(serving, name))


def _model(serving: Serving, name: str) -> dict[str, Any]:
    window = serving.session.facts.max_positions
    longest = int(window) if math.isfinite(window) else None
    about = {"object": "model", "created": serving.began, "owned_by": "distkv-dask"}
    adapted = {"parent": serving.names[0]} if name in serving.adapters else {}
    return {"id": name, **about, "max_model_len": longest, **adapted}
