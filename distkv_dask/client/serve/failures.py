"""Errors as OpenAI's clients expect them: the right status, and a JSON object that says what is wrong."""

from __future__ import annotations

import logging
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from distkv_dask.errors import (
    CapacityError,
    ChannelError,
    ClusterError,
    DistKVError,
    EngineClosedError,
    GangAbortedError,
    InvalidRequestError,
    MissingProgramError,
    WorkerLostError,
    in_words,
    without_quotes,
)

logger = logging.getLogger("distributed.distkv.serve")

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}

_STATUS: tuple[tuple[type[Exception], int, str | None], ...] = (
    (InvalidRequestError, 400, None),
    (CapacityError, 400, "context_length_exceeded"),
    (MissingProgramError, 501, None),
    (EngineClosedError, 503, "engine_closed"),
    (ClusterError, 503, None),
    (WorkerLostError, 503, "worker_lost"),
    (GangAbortedError, 503, "worker_lost"),
    (ChannelError, 503, "worker_lost"),
)
"""Our errors -> HTTP status, and OpenAI's code or one of ours."""


class Refusal(DistKVError):
    """A call that is answered with an error.

    Parameters
    ----------
    message
        What is wrong, and what to do.
    status
        HTTP status.
    code
        A code for programs.
    retry_after
        Seconds after which to try again.
    """

    def __init__(self, message: str, status: int = 400, code: str | None = None, retry_after: int | None = None):
        super().__init__(message, status, code, retry_after)
        self.status = status
        self.code = code
        self.retry_after = retry_after

    def __str__(self) -> str:
        return str(self.args[0])


def refusal_of(error: Exception) -> Refusal:
    """The answer for an error; errors that are not ours are answered without details."""
    if isinstance(error, Refusal):
        return error
    for kind, status, code in _STATUS:
        if isinstance(error, kind):
            return Refusal(in_words(error), status, code)
    if isinstance(error, DistKVError):
        return Refusal(in_words(error), 500)
    logger.error("a call failed: %s", without_quotes(error))
    return Refusal("the server failed on this request: see its log", 500)


def body_of(refusal: Refusal) -> dict[str, Any]:
    """The JSON object of an error."""
    usual = "server_error" if refusal.status >= 500 else "invalid_request_error"
    kind = _TYPES.get(refusal.status, usual)
    return {"error": {"message": str(refusal), "type": kind, "param": None, "code": refusal.code}}


def response_of(refusal: Refusal) -> Response:
    """The whole answer."""
    headers = {} if refusal.retry_after is None else {"Retry-After": str(refusal.retry_after)}
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body_of(refusal), refusal.status, headers)


def on_unknown(request: Request, error: Exception) -> Response:
    """Answer a call of an unknown path or method."""
    status = getattr(error, "status_code", 500)
    known = {404: "there is no such path", 405: "this path does not have this method"}
    return response_of(
        Refusal(f"{request.method} {request.url.path:.100}: {known.get(status, 'not possible')}", status)
    )
