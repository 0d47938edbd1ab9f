"""The workers of an open engine, from its status: their speed, and the number of tokens that fit their memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from distkv_dask.client.batch.pace import Means

if TYPE_CHECKING:
    from distkv_dask.client.session.session import Session


def means_of(session: Session) -> Means:
    """The workers of an open engine."""
    status = result_of(session, session.status)
    speeds = tuple(one.performance for one in status.workers.values() if one.role == "instance")
    room = sum(one.capacity_blocks for one in status.workers.values()) * status.block_tokens
    measured = sum(speed.measured for speed in speeds)
    basis = f"{measured} of {len(speeds)} workers were timed" if measured else "a preset: the workers were not timed"
    return Means(speeds, room, session.config.window_batch, status.exchange_seconds, basis)


def result_of(session: Session, ask: Callable[[], Any]) -> Any:
    """The result of a call on the Dask client's event loop, from any thread."""
    client = session.client
    if not client.asynchronous:
        return client.sync(ask) if asyncio.iscoroutinefunction(ask) else ask()

    async def asked() -> Any:
        return await ask()

    return asyncio.run_coroutine_threadsafe(asked(), client.loop.asyncio_loop).result()  # type: ignore[union-attr]
