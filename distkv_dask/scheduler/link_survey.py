"""The survey of links: workers measure their links when an engine opens, and those to workers that join later.

It ends after :data:`SECONDS`, even if some have not answered; the model then uses what was measured. Nothing is
measured twice.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING

from distkv_dask.errors import in_words
from distkv_dask.geometry import LinkTimes
from distkv_dask.messages.names import TIME_LINK, pack, unpack
from distkv_dask.placement import Endpoint
from distkv_dask.scheduler.costs.links import next_round, of_pair
from distkv_dask.scheduler.engines.engine import EngineState

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler

logger = logging.getLogger("distributed.distkv.gmanager")

SECONDS = 5.0
"""Maximum time that a survey adds to opening an engine."""
LINK_SECONDS = 2.0
"""Maximum time of one link."""


class LinkSurvey:
    """Surveys of all engines of a cluster.

    Parameters
    ----------
    scheduler
        The scheduler of this process.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._open: set[str] = set()

    async def engine_opens(self, state: EngineState) -> None:
        """Measure the links of all workers that have opened an engine."""
        self._open.add(state.spec.engine)
        self.worker_opened(state)
        if (task := self._under_way.get(state.spec.engine)) is not None:
            await asyncio.wait([task])

    def worker_opened(self, state: EngineState) -> None:
        """A worker has opened an engine; its links are measured now unless others are still opening it."""
        engine = state.spec.engine
        if engine not in self._open or engine in self._under_way or state.is_closing or not state.links.unknown():
            return
        task = asyncio.create_task(self._survey(state))
        self._under_way[engine] = task
        task.add_done_callback(partial(self._ended, state))

    def engine_closes(self, engine: str) -> None:
        """End a survey of an engine."""
        self._open.discard(engine)
        if (task := self._under_way.get(engine)) is not None:
            task.cancel()

    def _ended(self, state: EngineState, task: asyncio.Task[None]) -> None:
        del self._under_way[state.spec.engine]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("links of engine %s were not measured", state.spec.engine, exc_info=error)
            return
        self.worker_opened(state)  # one may have opened it just now

    async def _survey(self, state: EngineState) -> None:
        try:
            async with asyncio.timeout(SECONDS):
                while pairs := state.links.unknown():  # workers may open the engine in the meantime
                    while some := next_round(pairs):
                        await asyncio.gather(*(self._measure(state, *both) for both in some))
                        pairs = [both for both in pairs if state.links.may_measure(*both)]
        except TimeoutError:
            logger.warning("links were measured for %g s; the others are assumed to be like these", SECONDS)
            for one, other in state.links.unknown():
                state.links.failed.add(of_pair(one, other))
        state.fit_costs()

    async def _measure(self, state: EngineState, here: Endpoint, there: Endpoint) -> None:
        times: LinkTimes | str
        try:
            call = getattr(self._scheduler.rpc(here.worker), TIME_LINK)
            times = unpack(await asyncio.wait_for(call(engine=state.spec.engine, peer=pack(there)), LINK_SECONDS))
        except TimeoutError:
            times = f"no answer within {LINK_SECONDS:g} s"
        except Exception as error:  # whatever a worker answers, the engine opens
            times = in_words(error)
        if isinstance(times, LinkTimes):
            state.links.times[of_pair(here, there)] = times
        else:
            logger.warning("the link of %s and %s was not measured: %s", here.worker, there.worker, times)
            state.links.fail(here, there)
