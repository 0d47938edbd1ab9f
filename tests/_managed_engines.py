"""An rManager that opens empty engines, on lanes that only record whether they were closed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from _managed import ADDRESS, Managed, Threaded

from distkv_dask.messages import to_worker as do
from distkv_dask.worker import open_lanes, startup


class Lanes:
    """Lanes that record whether they were closed."""

    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


@dataclass(frozen=True)
class Facts:
    """What an engine reports when it is open."""

    engine: str


class Engine:
    """An open engine; ``order`` lists what was closed, in order."""

    def __init__(self, name: str, lanes: Lanes, order: list[str]) -> None:
        self.facts, self.lanes, self.closed = Facts(name), lanes, 0
        self.device = SimpleNamespace(lost="")
        self.runtime = SimpleNamespace(pool=SimpleNamespace(device=self.device))
        self.spec = SimpleNamespace(config=SimpleNamespace(timeout_close=1.5))
        self._name, self._order = name, order

    def close(self) -> None:
        self.closed += 1
        self._order.append(f"{self._name} closed, lanes {'closed' if self.lanes.closed else 'open'}")


class Worker(Managed):
    """An rManager whose engines are built here; for engines in ``faults``, the error is raised instead."""

    def __init__(self) -> None:
        super().__init__(Threaded())
        self.faults: dict[str, Exception] = {}
        self.built: list[Engine] = []
        self.order: list[str] = []
        self.made: list[Lanes] = []
        self.meanwhile: Callable[[], None] = lambda: None
        self.manager._lanes.start = self._start_lanes  # type: ignore[assignment, method-assign]

    def _start_lanes(self, threads: int | None) -> Lanes:
        if self.manager._lanes.current is None:
            self.made.append(Lanes())
            self.manager._lanes.current = self.made[-1]  # type: ignore[assignment]
        return self.manager._lanes.current  # type: ignore[return-value]

    def build_engine(self, spec: Any, geometry: Any, lanes: Lanes, *_: Any) -> Engine:
        """Replaces the function with which an rManager opens an engine."""
        self.meanwhile()
        if spec.engine in self.faults:
            raise self.faults[spec.engine]
        self.built.append(Engine(spec.engine, lanes, self.order))
        return self.built[-1]

    def open(self, *names: str) -> None:
        for name in names:
            spec = SimpleNamespace(engine=name, config=SimpleNamespace(threads=1))
            self.manager.receive(name, do.Open(ADDRESS, spec))  # type: ignore[arg-type]

    def close(self, *names: str) -> None:
        for name in names:
            self.manager.receive(name, do.Close(ADDRESS))

    async def idle(self) -> None:
        """Wait until nothing is in progress."""
        await asyncio.sleep(0)
        while self.manager._tasks:
            await asyncio.wait(self.manager._tasks)
        for _ in range(3):  # callbacks of other threads
            await asyncio.sleep(0)


def worker(test: Callable[[Worker], Awaitable[None]]) -> Callable[[], None]:
    """Make a test that runs on an event loop."""

    def run() -> None:
        async def on_a_worker() -> None:
            one = Worker()
            with (
                patch.object(startup, "build_engine", one.build_engine),
                patch.object(open_lanes, "give_back_freed_memory"),  # leave the allocator of this process alone
            ):
                await test(one)

        asyncio.run(on_a_worker())

    run.__name__ = test.__name__  # type: ignore[attr-defined]
    return run
