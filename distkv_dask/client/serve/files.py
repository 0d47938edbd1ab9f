"""``/v1/files``: uploads requests of batches, and downloads answers."""

from __future__ import annotations

import asyncio

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response

from distkv_dask.client.serve.batch_queue import BatchQueue
from distkv_dask.client.serve.failures import Refusal
from distkv_dask.client.serve.lists import page
from distkv_dask.client.serve.shelf import shelf_of

UPLOAD_SECONDS = 600.0
"""Time in which a file must arrive, in seconds."""


async def upload(request: Request) -> Response:
    """Keep a file that has ``purpose="batch"``."""
    try:
        async with asyncio.timeout(UPLOAD_SECONDS), request.form(max_files=1, max_fields=4) as form:
            if unknown := form.keys() - {"file", "purpose"}:
                raise Refusal(f"{min(unknown)!r:.100} is not supported: send file and purpose")
            file, purpose = form.get("file"), form.get("purpose")
            if not isinstance(file, UploadFile):
                raise Refusal("the form has no file: send it as the part 'file' of multipart/form-data")
            if purpose != "batch":
                raise Refusal(f"purpose is {purpose!r:.100}, but only files of requests (batch) are kept")
            shelf, name = shelf_of(request), file.filename or "file"
            return JSONResponse(await asyncio.to_thread(shelf.add_file, file.file, name[-200:], "batch"))
    except HTTPException as error:
        raise Refusal(f"the form cannot be read: {error.detail}") from error
    except TimeoutError:
        raise Refusal(f"the file did not arrive within {UPLOAD_SECONDS:g} s", 408) from None
    except ClientDisconnect:
        raise Refusal("the client disconnected before its file was complete", 400) from None


async def files(request: Request) -> Response:
    """List files, the newest first."""
    purpose = request.query_params.get("purpose")
    found = [one for one in shelf_of(request).records("file") if purpose in (None, one["purpose"])]
    return JSONResponse(page(found, request, frozenset({"purpose"})))


async def file(request: Request) -> Response:
    """Describe a file."""
    return JSONResponse(shelf_of(request).read(_id(request)))


async def content(request: Request) -> Response:
    """A file itself."""
    return FileResponse(shelf_of(request).path(_id(request)), media_type="application/octet-stream")


async def delete(request: Request) -> Response:
    """Delete a file, unless a batch needs it."""
    batches: BatchQueue = request.app.state.batches
    shelf_of(request).read(_id(request))
    if _id(request) in batches.needed():
        raise Refusal("a batch that has not ended reads the file: cancel it first", 409, "in_use")
    shelf_of(request).remove(_id(request))
    return JSONResponse({"id": _id(request), "object": "file", "deleted": True})


def _id(request: Request) -> str:
    name: str = request.path_params["name"]
    if not name.startswith("file-"):
        raise Refusal(f"{name!r:.100} is not the id of a file", 404, "not_found")
    return name
