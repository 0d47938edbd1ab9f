"""Measurements of the links between an engine's workers. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from distkv_dask.config import Config
from distkv_dask.geometry import Geometry, LinkTimes
from distkv_dask.messages.from_worker import Opened
from distkv_dask.placement import Endpoint
from distkv_dask.scheduler.costs.fit import fit_model
from distkv_dask.scheduler.costs.links import MOST_FAILURES, of_pair, wanted, with_links
from distkv_dask.scheduler.costs.model import Pair, PerformanceModel
from distkv_dask.scheduler.costs.presets import PRESET


class LinkRecord:
    """Measured links, and those whose measurement failed.

    Parameters
    ----------
    facts
        Workers' reports at opening, as the engine changes them.
    config
        The engine's settings.
    """

    def __init__(self, facts: Mapping[str, Opened], config: Config) -> None:
        self._facts = facts
        self._off = config.performance == "preset" or config.stage_count > 1
        self.times: dict[Pair, LinkTimes] = {}
        self.failed: set[Pair] = set()
        self._failures: Counter[str] = Counter()

    def unknown(self) -> list[tuple[Endpoint, Endpoint]]:
        """Workers whose links have to be measured, if links are."""
        ends = self._ends()
        if self._off or len(ends) < 2:
            return []
        pairs = wanted(ends, self.times.keys() | self.failed)
        return [both for both in pairs if self.may_measure(*both)]

    def may_measure(self, one: Endpoint, other: Endpoint) -> bool:
        """Whether both workers have the engine, and few of their links have failed."""
        both = {one.worker, other.worker}
        return both <= self._facts.keys() and all(self._failures[worker] < MOST_FAILURES for worker in both)

    def fail(self, one: Endpoint, other: Endpoint) -> None:
        """The link of two workers cannot be measured."""
        self.failed.add(of_pair(one, other))
        self._failures.update({one.worker, other.worker})

    def remove_worker(self, worker: str) -> None:
        """A worker is gone."""
        self._failures.pop(worker, None)
        for both in [both for both in self.times if worker in both]:
            del self.times[both]
        self.failed = {both for both in self.failed if worker not in both}

    def model(self, geometry: Geometry) -> PerformanceModel:
        """A performance model of what was measured of workers and links."""
        measured = {worker: facts.measured for worker, facts in self._facts.items()}
        return with_links(fit_model(geometry, measured, PRESET), self._ends(), self.times)

    def _ends(self) -> dict[str, Endpoint]:
        return {worker: facts.endpoint for worker, facts in self._facts.items()}
