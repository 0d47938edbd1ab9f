"""``/v1/batches``: files of requests, answered in the background; they survive restarts."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from distkv_dask.client.batch.openai_request import PATHS
from distkv_dask.client.serve.batch_queue import BatchQueue
from distkv_dask.client.serve.body import read_json
from distkv_dask.client.serve.failures import Refusal
from distkv_dask.client.serve.lists import page
from distkv_dask.client.serve.shelf import shelf_of, shown

WINDOW = "24h"
"""The one completion window of OpenAI's API; nothing expires here."""


async def create(request: Request) -> Response:
    """Create a batch from a file."""
    body, shelf = dict(await read_json(request)), shelf_of(request)
    name, endpoint, window, metadata = (
        body.pop(key, None) for key in ("input_file_id", "endpoint", "completion_window", "metadata")
    )
    if left := sorted(key for key, value in body.items() if value is not None):
        raise Refusal(f"{left[0]!r:.100} is not supported: a batch has input_file_id, endpoint and metadata")
    if endpoint not in PATHS:
        raise Refusal(f"endpoint is {endpoint!r:.100}, but only {' and '.join(PATHS)} are answered")
    if window != WINDOW:
        raise Refusal(f"completion_window is {window!r:.100}, but must be {WINDOW!r}; nothing expires")
    if metadata is not None and not _is_metadata(metadata):
        raise Refusal("metadata should be an object of at most 16 texts")
    if not isinstance(name, str) or shelf.read(name).get("purpose") != "batch":
        raise Refusal(f"input_file_id is {name!r:.100}, which is not a file with the purpose batch")
    record = _new(name, endpoint, metadata)
    await asyncio.to_thread(_batches(request).add, shelf.owned(record))
    return JSONResponse(record)


async def batches(request: Request) -> Response:
    """List batches, the newest first."""
    return JSONResponse(page(shelf_of(request).records("batch"), request))


async def batch(request: Request) -> Response:
    """Progress of a batch."""
    return JSONResponse(shelf_of(request).read(_id(request)))


async def cancel(request: Request) -> Response:
    """End a batch; the answers so far are written."""
    shelf_of(request).read(_id(request))
    return JSONResponse(shown(await asyncio.to_thread(_batches(request).cancel, _id(request))))


def _new(name: str, endpoint: str, metadata: dict[str, str] | None) -> dict[str, Any]:
    times = ("in_progress", "expires", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
    return {
        "id": f"batch-{secrets.token_hex(12)}", "object": "batch", "endpoint": endpoint, "errors": None,
        "input_file_id": name, "completion_window": WINDOW, "status": "validating", "output_file_id": None,
        "error_file_id": None, "created_at": int(time.time()), **{f"{one}_at": None for one in times},
        "request_counts": {"total": 0, "completed": 0, "failed": 0}, "metadata": metadata,
    }  # fmt: skip


def _is_metadata(value: Any) -> bool:
    return isinstance(value, dict) and len(value) <= 16 and all(isinstance(one, str) for one in value.values())


def _id(request: Request) -> str:
    name: str = request.path_params["name"]
    if not name.startswith("batch-"):
        raise Refusal(f"{name!r:.100} is not the id of a batch", 404, "not_found")
    return name


def _batches(request: Request) -> BatchQueue:
    found: BatchQueue = request.app.state.batches
    return found
