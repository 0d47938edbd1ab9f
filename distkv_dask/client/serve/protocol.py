"""HTTP by uvicorn, with a time limit for the heads of requests."""

from __future__ import annotations

import asyncio
from typing import cast

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 30.0
"""Time in which the head of a request must arrive, after the connection or the last answer, in seconds."""


class PromptProtocol(H11Protocol):
    """One connection; closed unless a request is complete within the time limit, however often a byte arrives.

    Bodies that are read have their own limits (:mod:`distkv_dask.client.serve.body`); this one closes connections whose
    bodies are not read.
    """

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the time limit of the first request."""
        super().connection_made(cast("asyncio.Transport", transport))
        self._wait()

    def data_received(self, data: bytes) -> None:
        """End the time limit once a request has begun."""
        super().data_received(data)
        self._wait()

    def on_response_complete(self) -> None:
        """Start the time limit of the next request."""
        super().on_response_complete()
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        super().connection_lost(exc)
        self._end_wait()

    def _wait(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._end_wait()
        elif self._late is None and not self.transport.is_closing():
            self._late = self.loop.call_later(HEADER_SECONDS, self.timeout_keep_alive_handler)

    def _end_wait(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
