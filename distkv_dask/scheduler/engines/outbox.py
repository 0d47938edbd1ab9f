"""Events for one handle of an engine, kept until it acknowledges them."""

from __future__ import annotations

import asyncio
import contextlib

from distkv_dask.messages.client_calls import Delivery


class Outbox:
    """Items in order, for one reader.

    Parameters
    ----------
    client
        Id of the Dask client that reads them.
    """

    def __init__(self, client: str) -> None:
        self.client = client
        self._items: list[Delivery] = []
        self._heard = 0
        self._news = asyncio.Event()
        self._closed = False

    def put(self, delivery: Delivery) -> None:
        """Add tokens or an end."""
        self._items.append(delivery)
        self._news.set()

    def close(self) -> None:
        """End waiting polls; events that have arrived can still be read."""
        self._closed = True
        self._news.set()

    async def take_unheard(self, heard: int, wait: float) -> list[Delivery]:
        """Items after the first ``heard``; waits up to ``wait`` seconds for one.

        Items are kept until they are acknowledged, so that a lost reply loses nothing.
        """
        heard = max(heard, self._heard)  # a poll overtaken by a later one acknowledges less
        del self._items[: heard - self._heard]
        self._heard = heard
        if not self._items and not self._closed:
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), wait)
        return list(self._items)
