"""Bodies of calls: read up to a limit of bytes and of time, and made into JSON objects."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive

from distkv_dask.client.serve.failures import Refusal

BODY_SECONDS = 60.0
"""Time in which a body must arrive, in seconds."""

DISCARD_SECONDS = 5.0
"""Time for which an unread body is received: a client that is sending does not read an answer."""


def limited(receive: Receive, limit: int) -> Receive:
    """The same messages, until a body has more than ``limit`` bytes."""
    read = 0

    async def receive_within() -> Message:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        if read > limit:
            await discard(receive)
            raise too_large(limit)
        return message

    return receive_within


def too_large(limit: int) -> Refusal:
    """The error for a body of more bytes than ``limit``."""
    return Refusal(f"the request has more than {limit:,} bytes: send less, or start the server with --max-body", 413)


async def discard(receive: Receive) -> None:
    """Read the rest of a body for a short time, so that the client sees the answer."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            while (await receive()).get("more_body", False):
                pass


async def read_json(request: Request) -> Mapping[str, Any]:
    """The JSON object that a call has as its body.

    Raises
    ------
    Refusal
        When the body is not a JSON object, is too large, or takes too long.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # the only type that pages of other sites cannot send without permission
        raise Refusal(f"the body is of type {kind!r:.100}: send it as application/json", 415)
    try:
        async with asyncio.timeout(BODY_SECONDS):
            data = await request.body()
    except TimeoutError:
        raise Refusal(f"the body did not arrive within {BODY_SECONDS:g} s", 408) from None
    except ClientDisconnect:
        raise Refusal("the client disconnected before its request was complete", 400) from None
    return await asyncio.to_thread(_parsed, data)


def _parsed(data: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(data, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the body is not JSON: {error}" if str(error) else "the body is not JSON") from error
    if not isinstance(found, dict):
        raise Refusal(f"the body is a JSON {type(found).__name__}: send an object")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; duplicate names are refused, because one of their values would be ignored."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a name twice")
    return found
