"""The gate before all calls: checks keys, limits their number and size, and counts them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from time import perf_counter

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from distkv_dask.client.serve.body import discard, limited, too_large
from distkv_dask.client.serve.failures import Refusal, response_of
from distkv_dask.client.serve.keys import OWNER, Keys
from distkv_dask.client.serve.metrics import Metrics

HEALTH = "/health"
"""The one path that needs no key."""

FILES = "/v1/files"

FILE_BYTES = 200 << 20
"""Largest body with a file, as in OpenAI's API."""

LOCAL = frozenset(("localhost", "127.0.0.1", "[::1]"))
"""Names of this machine in a Host header."""

AGAIN = 1, 60
"""Minimum and maximum of the seconds after which a client should try again."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a server.

    Parameters
    ----------
    body_bytes
        Largest body of a call without a file.
    open_requests
        Most open calls; further ones are answered with 429.
    drain_seconds
        Seconds that open calls have to end when the server stops.
    """

    body_bytes: int = 32 << 20
    open_requests: int = 64
    drain_seconds: float = 30.0


class Gate:
    """ASGI middleware.

    Parameters
    ----------
    app
        The application.
    keys, limits
        API keys, and limits.
    metrics
        Counts calls.
    paths
        Paths with their own counts.
    """

    def __init__(self, app: ASGIApp, keys: Keys, limits: Limits, metrics: Metrics, paths: Iterable[str]) -> None:
        self._app = app
        self._keys = keys
        self._limits = limits
        self._metrics = metrics
        self._paths = frozenset(paths)
        self._open = 0
        self._usual = 1.0
        self.is_stopping = False
        """Whether new calls are refused because the server is about to end."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a call through, or answer it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = perf_counter(), 499  # no answer: the client has disconnected

        async def sent(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        works = scope["method"] == "POST"
        owner = self._keys.owner(Headers(scope=scope).get("authorization"))
        scope.setdefault("state", {})[OWNER] = owner
        refusal = self._refused(scope, works, owner)
        try:
            if refusal is not None:
                await discard(receive)
                await response_of(refusal)(scope, receive, sent)
                return
            self._open += works
            self._metrics.open.set(self._open)
            try:
                await self._app(scope, limited(receive, self._most_bytes(scope)), sent)
            finally:
                self._open -= works
                self._metrics.open.set(self._open)
                if works:
                    self._usual += (perf_counter() - began - self._usual) / 8
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.calls.labels(path, str(status)).inc()
            self._metrics.seconds.labels(path).observe(perf_counter() - began)

    def _refused(self, scope: Scope, works: bool, owner: str | None) -> Refusal | None:
        headers = Headers(scope=scope)
        if scope["path"] == HEALTH:
            return None
        if not self._keys and (host := _host(headers.get("host", ""))) not in LOCAL:
            return Refusal(
                f"the server has no API keys, so it only answers calls from this machine, not from {host:.100}", 403
            )
        if owner is None:
            return Refusal("the API key is missing or wrong: send Authorization: Bearer KEY", 401, "invalid_api_key")
        if self.is_stopping:
            return Refusal("the server is stopping", 503, "stopping", AGAIN[0])
        if works and self._open >= self._limits.open_requests:
            return Refusal(
                f"{self._open} requests are open, the maximum of this server: try again later",
                429, "too_many_requests", self._pause(),
            )  # fmt: skip
        length, most = headers.get("content-length", "0"), self._most_bytes(scope)
        if length.isdecimal() and int(length) > most:
            return too_large(most)
        return None

    def _pause(self) -> int:
        """Seconds until one of the open calls will probably have ended."""
        return min(AGAIN[1], max(AGAIN[0], math.ceil(self._usual / max(1, self._open))))

    def _most_bytes(self, scope: Scope) -> int:
        return max(FILE_BYTES, self._limits.body_bytes) if scope["path"] == FILES else self._limits.body_bytes


def _host(header: str) -> str:
    """The name in a Host header, without the port."""
    name, colon, port = header.rpartition(":")
    return name.lower() if colon and port.isdecimal() else header.lower()
