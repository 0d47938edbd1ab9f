"""The process that listens: it starts, answers, and stops in order."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn

from distkv_dask.client.serve.gate import Gate
from distkv_dask.client.serve.protocol import PromptProtocol
from distkv_dask.client.serve.serving import Serving

STOPPED_SECONDS = 5.0
"""Time to send the ends of cancelled requests, in seconds."""

LOOK = 0.1
"""Seconds between checks whether to stop."""


class Server:
    """Answers calls until it is stopped.

    Parameters
    ----------
    gate
        The application.
    serving
        Knows the open requests.
    listener
        See :func:`distkv_dask.client.listener.listener_at`; closed in the end.
    """

    def __init__(self, gate: Gate, serving: Serving, listener: socket.socket) -> None:
        self._gate = gate
        self._serving = serving
        self._listener = listener
        limit = int(serving.limits.drain_seconds + STOPPED_SECONDS) + 1
        settings = uvicorn.Config(
            gate, log_level="warning", access_log=False, lifespan="on", server_header=False, http=PromptProtocol,
            ws="none", timeout_graceful_shutdown=limit,
        )  # fmt: skip
        self._uvicorn = uvicorn.Server(settings)

    def stop(self) -> None:
        """Refuse new calls, and end when open ones have ended or their time is over; from any thread."""
        self._gate.is_stopping = True
        self._uvicorn.should_exit = True

    def run(self, ready: Callable[[], None]) -> None:
        """Answer until :meth:`stop` or a signal; ``ready`` is called at the start."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again when it has ended
                signal.signal(number, _nothing)
        asyncio.run(self._run(ready))

    async def _run(self, ready: Callable[[], None]) -> None:
        serving = asyncio.create_task(self._uvicorn.serve(sockets=[self._listener]))
        while not self._uvicorn.started and not serving.done():
            await asyncio.sleep(LOOK)
        if self._uvicorn.started:
            ready()
        while not self._uvicorn.should_exit and not serving.done():
            await asyncio.sleep(LOOK)
        self._gate.is_stopping = True
        await asyncio.wait({serving}, timeout=self._serving.limits.drain_seconds)
        self._serving.cancel_all()
        await serving


def _nothing(_: int, __: FrameType | None) -> None:
    pass
