"""The lanes of a worker: its engines share them, and they exist while an engine is open."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from distributed import Worker
from distributed.comm.addressing import get_address_host

from distkv_dask.worker.heap import give_back_freed_memory

if TYPE_CHECKING:
    from distkv_dask.worker.lanes import Lanes


class OpenLanes:
    """Lanes that are started for the first engine and closed after the last one.

    Parameters
    ----------
    worker
        This worker.
    ended
        Called with the reason, on the ending thread, when a lane ends without being closed.
    """

    def __init__(self, worker: Worker, ended: Callable[[str], None]) -> None:
        self._worker = worker
        self._ended = ended
        self.current: Lanes | None = None
        """The lanes, while an engine is open."""

    def start(self, threads: int | None) -> Lanes:
        """The lanes, started if needed; in a thread, since the imports alone take seconds."""
        from distkv_dask.worker.channels.tls import Certificates
        from distkv_dask.worker.lanes import Lanes

        if (lanes := self.current) is None:
            address = self._worker.address
            host = "127.0.0.1" if address.startswith("inproc://") else get_address_host(address)
            certificates = Certificates.of(self._worker.security)
            threads = threads or self._worker.state.nthreads
            self.current = lanes = Lanes(address, host, threads, certificates, self._ended)
        return lanes

    def give_up(self, lanes: Lanes) -> None:
        """Start new lanes for the next engine, if these are the current ones; the caller closes them."""
        if self.current is lanes:
            self.current = None

    async def close(self, lanes: Lanes | None = None) -> None:
        """Close ``lanes`` that are no longer used, by default the current ones, if there are any."""
        if lanes is None:
            lanes, self.current = self.current, None
        if lanes is not None:
            await asyncio.get_running_loop().run_in_executor(None, _end, lanes)


def _end(lanes: Lanes) -> None:
    lanes.close()
    give_back_freed_memory()  # behave like an ordinary Dask worker again
