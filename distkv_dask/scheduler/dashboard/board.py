"""The board: gives pages, JSON and metrics access to a scheduler's engines, and samples their history."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any

from distkv_dask.scheduler.dashboard.install import Installation
from distkv_dask.scheduler.dashboard.view import View, states_of, view_of
from distkv_dask.scheduler.engines.figures import Figures

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler

    from distkv_dask.scheduler.engines.engine import EngineState

FRESH = 0.4
"""Seconds for which a view is reused, so that many open pages cost as much as one."""

SHARE = 0.005
"""Part of a core that views may use: expensive views of large clusters are reused for longer."""

SAMPLE = 1.0
"""Seconds between samples of the history."""


class Board:
    """The gManager's views for users and monitoring.

    Parameters
    ----------
    scheduler
        The scheduler of this process.
    engines
        Its engines by name, as the gManager changes them.
    """

    def __init__(self, scheduler: Scheduler, engines: Mapping[str, EngineState]) -> None:
        self.engines = engines
        self.past = Figures()
        """Totals of engines that are closed, so that counters never go back."""
        self._scheduler = scheduler
        self._views: dict[str, View] = {}
        self._stale = float("-inf")
        self._sampler: asyncio.Task[None] | None = None
        self._installed: Installation | None = None

    def start(self) -> None:
        """The first engine opens: add the page, the JSON route and the metrics, and start sampling."""
        if self._installed is None:
            self._installed = Installation(self._scheduler, self)
        self._installed.metrics(True)
        if self._sampler is None:
            self._sampler = asyncio.create_task(self._sample())

    def stop(self) -> None:
        """The last engine is closed: the page stays and says so."""
        if self._sampler is not None:
            self._sampler.cancel()
            self._sampler = None
        if self._installed is not None:
            self._installed.metrics(False)

    def views(self) -> dict[str, View]:
        """One for each open engine, the newest last."""
        now = monotonic()
        if now > self._stale:
            self._views = {
                name: view_of(state.life, state.figures, state.spec.model, self.label, now)
                for name, state in self.engines.items()
            }
            self._stale = now + max(FRESH, (monotonic() - now) / SHARE)
        return self._views

    def status(self) -> dict[str, Any]:
        """The result of ``Engine.status`` for each engine, for JSON."""
        return {
            "engines": {name: {"model": one.spec.model, **one.status().as_dict()} for name, one in self.engines.items()}
        }

    def label(self, worker: str) -> str:
        """Short name of a worker: Dask's name if it is shorter than the address."""
        state = self._scheduler.workers.get(worker)
        name = worker if state is None else str(state.name)
        return name.split("://")[-1]

    async def _sample(self) -> None:
        while True:
            for state in self.engines.values():
                state.figures.sample(monotonic(), states_of(state.life))
            await asyncio.sleep(SAMPLE)
