"""Fetches the spans recorded by the workers' lanes at intervals, so that their ring buffers can be small."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from distkv_dask.client.trace_file import TraceFile
from distkv_dask.errors import ClusterError, EngineClosedError

logger = logging.getLogger("distributed.distkv.trace")

INTERVAL = 1.0
"""Seconds between two fetches."""


class TraceFetcher:
    """Moves spans from the cluster into a file; used on the engine's event loop.

    Parameters
    ----------
    file
        The file.
    fetch
        Asks the cluster for the spans since the last call.
    """

    def __init__(self, file: TraceFile, fetch: Callable[[], Awaitable[Any]]) -> None:
        self._file = file
        self._fetch = fetch
        self._busy = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start fetching."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Fetch the remaining spans, then stop."""
        async with self._busy:  # spans of a running call have left the rings already
            if self._task is not None:
                self._task.cancel()
        with contextlib.suppress(EngineClosedError):
            await self._once()

    async def _run(self) -> None:
        with contextlib.suppress(EngineClosedError):
            while not self._file.full:
                await asyncio.sleep(INTERVAL)
                await self._once()

    async def _once(self) -> None:
        async with self._busy:
            try:
                spans = await self._fetch()
                await asyncio.get_running_loop().run_in_executor(None, self._file.add, spans)
            except (OSError, ClusterError):  # a trace must not fail a request
                logger.exception("a part of the trace is lost")
