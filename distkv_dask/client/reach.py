"""Calls of the Dask scheduler that end when it is gone or silent, not when Dask's client gives up much later."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from distributed import Client

from distkv_dask.errors import ClusterError, DistKVError, EngineClosedError, in_words

T = TypeVar("T")

LOOK = 0.25
"""Seconds between looks at the connection to the scheduler."""

PATIENCE = 10.0
"""Seconds after which the scheduler is asked whether it is there at all, and that it has to answer."""

AGAIN = "Its engines ended with it: connect a client to a scheduler that runs, and open the engine there."


def lost(client: Client) -> str:
    """Why a scheduler cannot be asked, and what to do; empty while it can. From any thread."""
    comm = client.scheduler_comm
    if client.status == "running" and comm is not None and not comm.closed():
        return ""
    if client.status == "newly-created":
        return "the Dask client is not connected yet: await it first"
    if client.status in ("closing", "closed") and comm is None and client.scheduler is None:
        return (
            "the Dask client is closed, by its user or since its scheduler was gone for too long, and its engines with "
            "it: make a new client and a new engine"
        )
    return (
        f"the connection to the Dask scheduler{_at(client)} is lost: it died, was restarted, or the network was cut. "
        f"{AGAIN}"
    )


async def answered(client: Client, call: Awaitable[T]) -> T:
    """What the scheduler answers.

    Raises
    ------
    EngineClosedError
        It is gone, or does not answer anything any more.
    ClusterError
        The call failed on its way, although the scheduler is there: it may be made again.
    DistKVError
        What the gManager says.
    """
    work = asyncio.ensure_future(call)
    try:
        waited = 0.0
        while not work.done():
            _check(client)
            await asyncio.wait([work], timeout=LOOK)
            waited += LOOK
            if waited >= PATIENCE and not work.done():
                waited = 0.0
                await _greet(client)
        return work.result()
    except DistKVError:
        raise
    except OSError as error:
        for _ in range(round(1 / LOOK)):  # its end may be seen here before Dask's client sees it
            _check(client)
            await asyncio.sleep(LOOK)
        raise ClusterError(f"the Dask scheduler{_at(client)} took no call ({in_words(error)}): try again") from error
    finally:
        work.add_done_callback(lambda done: done.cancelled() or done.exception())
        work.cancel()


def _check(client: Client) -> None:
    if why := lost(client):
        raise EngineClosedError(why)


async def _greet(client: Client) -> None:
    """Ask the scheduler for the little that any scheduler can say."""
    try:
        assert client.scheduler is not None  # the connection was looked at just before
        await asyncio.wait_for(client.scheduler.identity(n_workers=0), PATIENCE)
    except OSError as error:
        _check(client)
        raise EngineClosedError(
            f"the Dask scheduler{_at(client)} has not answered for {2 * PATIENCE:g} s: it is frozen, overloaded or cut "
            f"off. See its log and its machine; once it runs, connect a new client and open the engine again."
        ) from error


def _at(client: Client) -> str:
    return "" if client.scheduler is None else f" at {client.scheduler.address}"
