"""Departures: workers that Dask retires are drained first; those whose blocks fit nowhere else stay."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from time import monotonic
from typing import Any

from distkv_dask.scheduler.dispatch import Dispatcher
from distkv_dask.scheduler.engines.engine import EngineState
from distkv_dask.scheduler.lifecycle.events import Drain
from distkv_dask.scheduler.tasks.submitter import DRAIN_INTERVAL


async def retire(dispatcher: Dispatcher, workers: list[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Move all blocks away from workers, and let Dask retire those that are empty then; returns Dask's result.

    Parameters
    ----------
    options
        Of Dask's own ``retire_workers``.
    """
    retired: dict[str, Any] = {}
    engines = dispatcher.engines
    try:
        await asyncio.gather(*(_drain(dispatcher, state, workers) for state in list(engines.values())))
        drained = [one.is_drained for one in engines.values()]
        empty = [worker for worker in workers if all(is_drained(worker) for is_drained in drained)]
        retired = await dispatcher.scheduler.retire_workers(workers=empty, **options)
    finally:  # workers that stay for any reason get work again
        for state in engines.values():
            for worker in set(workers) - set(retired):
                dispatcher.handle(state, Drain(worker, False))
    return retired


async def _drain(dispatcher: Dispatcher, state: EngineState, workers: list[str]) -> None:
    """Move an engine's blocks away from workers, for at most ``distkv.timeouts.drain``."""
    deadline = monotonic() + state.spec.config.timeout_drain
    for worker in workers:
        dispatcher.handle(state, Drain(worker, True))
    while not all(map(state.is_drained, workers)) and not state.is_closing and monotonic() < deadline:
        await asyncio.sleep(DRAIN_INTERVAL)
