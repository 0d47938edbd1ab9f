"""The process that listens: starts, stops in an orderly way, and answers until then."""

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
"""Time for the last words of cancelled requests to be sent."""

LOOK = 0.1
"""Seconds between two looks at whether to stop."""


class Server:
    """Answers calls until it is told to stop.

    Parameters
    ----------
    gate
        The application.
    serving
        Knows what is under way.
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
        """Refuse new calls, and end when those under way have, or after their time; from any thread."""
        self._gate.is_stopping = True
        self._uvicorn.should_exit = True

    def run(self, ready: Callable[[], None]) -> None:
        """Answer until :meth:`stop`, or a signal to end; ``ready`` is called when it begins."""
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
