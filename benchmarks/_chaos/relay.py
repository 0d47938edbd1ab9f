"""Without network namespaces: workers reach each other's holder lanes through relays, which can stop forwarding.

This cuts only channels between workers, not the connections of Dask's processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from dataclasses import replace
from typing import Any

from distkv_dask.messages.from_worker import Opened
from distkv_dask.messages.names import FROM_WORKER, pack, unpack
from distkv_dask.placement import Endpoint


class Relay:
    """Forwards between ``port`` and a holder lane, unless it was told to hold everything back."""

    def __init__(self, holder: Endpoint, loop: asyncio.AbstractEventLoop) -> None:
        self.sound = asyncio.Event()
        self.sound.set()
        self._holder = holder
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        self.server = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, sock=listener), loop)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError):
            await self.sound.wait()
            there, back = await asyncio.open_connection(self._holder.host, self._holder.port)
            with contextlib.closing(back):
                ways = [asyncio.create_task(self._forward(*way)) for way in ((reader, back), (there, writer))]
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                for way in ways:
                    way.cancel()

    async def _forward(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 20):
                await self.sound.wait()
                target.write(data)
                await target.drain()


class Relays:
    """A relay before every holder lane of an engine; made before the engine is opened.

    Parameters
    ----------
    scheduler
        In this process, with a gManager.
    """

    def __init__(self, scheduler: Any) -> None:
        self._relays: list[tuple[str, Relay]] = []
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._handle = scheduler.stream_handlers[FROM_WORKER]
        scheduler.stream_handlers[FROM_WORKER] = self._worker_event

    def cut(self, host: str, broken: bool) -> None:
        """Stop the relays to a host, or let them forward again, beginning with what they held back."""
        for relay in [relay for there, relay in list(self._relays) if there == host]:
            self._loop.call_soon_threadsafe(relay.sound.clear if broken else relay.sound.set)

    def close(self) -> None:
        """Stop forwarding."""
        for _, relay in self._relays:
            self._loop.call_soon_threadsafe(relay.server.result().close)
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _worker_event(self, worker: str, version: str, engine: str = "", message: Any = None) -> None:
        """A worker reports the address of its holder lane: replace it by the relay's."""
        if isinstance(opened := unpack(message), Opened):
            holder: Endpoint = opened.endpoint
            relay = Relay(holder, self._loop)
            self._relays.append((holder.host, relay))
            message = pack(replace(opened, endpoint=replace(holder, host="127.0.0.1", port=relay.port, unix="")))
        self._handle(worker, version, engine, message)
