"""Calls to the Dask scheduler that fail as soon as it is gone or silent; Dask's client fails much later."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

from distributed import Client

from distkv_dask.errors import ClusterError, DistKVError, EngineClosedError, in_words

T = TypeVar("T")

LOOK = 0.25
"""Seconds between checks of the connection to the scheduler."""

PATIENCE = 10.0
"""Time limit in seconds for a client to connect, for a scheduler to be silent before it is pinged, and for its
reply."""

AGAIN = "Its engines ended with it: connect a client to a scheduler that runs, and open the engine there."


def lost(client: Client) -> str:
    """Why the scheduler of a connected client cannot be reached, and what to do; empty if it can.

    From any thread.
    """
    comm = client.scheduler_comm
    if client.status == "running" and comm is not None and not comm.closed():
        return ""
    if is_closed(client):
        return (
            "the Dask client is closed, by its user or because its scheduler was gone too long, and its engines with "
            "it: make a new client and a new engine"
        )
    return (
        f"the connection to the Dask scheduler{_at(client)} is lost: it died, was restarted, or the network was cut. "
        f"{AGAIN}"
    )


def is_closed(client: Client) -> bool:
    """Whether a client was closed, or is being closed; from any thread."""
    return client.status in ("closing", "closed")


async def connected(client: Client) -> None:
    """Wait for a client that is still connecting.

    Dask gives the client that the first task of a worker makes to the next task before it is connected, and a user's
    client connects again where its scheduler was restarted.

    Raises
    ------
    EngineClosedError
        It is closed, or not connected after :data:`PATIENCE`.
    """
    for _ in range(_looks(PATIENCE)):
        if not lost(client):
            return
        if is_closed(client):
            break
        await asyncio.sleep(LOOK)
    _check(client)


async def answered(client: Client, call: Awaitable[T]) -> T:
    """Return the scheduler's answer.

    Raises
    ------
    EngineClosedError
        The scheduler is gone, or no longer answers.
    ClusterError
        There is no answer, although the scheduler is reachable: the call may have arrived or not.
    DistKVError
        The gManager's error.
    """
    work, gone = asyncio.ensure_future(call), asyncio.ensure_future(_gone(client))
    try:
        await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise EngineClosedError(gone.result())
        return work.result()
    except DistKVError:
        raise
    except OSError as error:
        for _ in range(_looks(1.0)):  # this may notice its end before Dask's client does
            _check(client)
            await asyncio.sleep(LOOK)
        raise ClusterError(
            f"a call to the Dask scheduler{_at(client)} got no answer ({in_words(error)}), although it can be "
            "reached: try again"
        ) from error
    finally:
        for one in (work, gone):
            _drop(one)


async def _gone(client: Client) -> str:
    """Wait until the scheduler is gone or silent; returns the reason.

    Checks are counted, not seconds: if this process itself was stopped, elapsed time says nothing about the scheduler.
    """
    quiet, greeting = 0, None
    try:
        while not (why := lost(client)):
            if quiet == 2 * _looks(PATIENCE):
                return (
                    f"the Dask scheduler{_at(client)} has not answered for {2 * PATIENCE:g} s: it is frozen, "
                    "overloaded or cut off. See its log and its machine; once it runs, connect a new client and open "
                    "the engine again."
                )
            if quiet == _looks(PATIENCE) and client.scheduler is not None:
                greeting = asyncio.ensure_future(client.scheduler.identity(n_workers=0))  # every scheduler has it
            await asyncio.sleep(LOOK)
            quiet += 1
            if greeting is not None and greeting.done() and greeting.exception() is None:
                quiet, greeting = 0, None
        return why
    finally:
        if greeting is not None:
            _drop(greeting)


def _drop(work: asyncio.Future[Any]) -> None:
    """Cancel a task and ignore its result."""
    work.add_done_callback(lambda done: done.cancelled() or done.exception())
    work.cancel()


def _looks(seconds: float) -> int:
    return round(seconds / LOOK)


def _check(client: Client) -> None:
    if why := lost(client):
        raise EngineClosedError(why)


def _at(client: Client) -> str:
    return "" if client.scheduler is None else f" at {client.scheduler.address}"
