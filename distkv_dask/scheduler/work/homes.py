"""Homes: the workers of an engine that decode, each with a chain of windows, which sequences join and leave.

How long the next window is depends on who waits for its end (:mod:`~distkv_dask.scheduler.work.pacing`). Pure: events
go in, commands come out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial

from distkv_dask.config import Config
from distkv_dask.errors import GangAbortedError
from distkv_dask.scheduler.commands import Command, Join
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.lifecycle.request import Live
from distkv_dask.scheduler.policies.queue import Admission
from distkv_dask.scheduler.work.gangs import Gangs
from distkv_dask.scheduler.work.pacing import Pace, Pacer
from distkv_dask.scheduler.work.prefill import Prefilling
from distkv_dask.scheduler.work.starts import not_started
from distkv_dask.scheduler.work.windows import WindowChain
from distkv_dask.types import Endpoint, Gang, Placement


class Homes:
    """The chains of one engine, by worker.

    Parameters
    ----------
    engine
        The engine's id.
    config
        Sizes of windows, and how long one may take to start.
    ledger, live, queue, gangs, prefilling
        The lifecycle's.
    placement
        Where the home of a sequence looks for its blocks.
    pacer
        The scheduler's budget, where several engines share it.
    """

    def __init__(
        self,
        engine: str,
        config: Config,
        ledger: Ledger,
        live: Mapping[int, Live],
        queue: Admission,
        gangs: Gangs,
        prefilling: Prefilling,
        placement: Callable[[int], Placement],
        pacer: Pacer,
    ) -> None:
        self._engine = engine
        self._config = config
        self._ledger = ledger
        self._live = live
        self._queue = queue
        self._gangs = gangs
        self._prefilling = prefilling
        self._placement = placement
        self._pacer = pacer
        limit = config.timeout_start / 2  # holders of the next window wait while this one runs
        self._pace = Pace(
            watched=min(config.window_stream_seconds, limit),
            unwatched=min(config.window_seconds, limit),
            longest=min(config.window_max_seconds, limit),
            share=config.window_scheduler_share,
        )
        self._ordinals: dict[str, int] = {}
        self.chains: dict[str, WindowChain] = {}

    # Workers

    def add(self, worker: str) -> None:
        """A worker may become the home of sequences."""
        ordinal = self._ordinals.setdefault(worker, len(self._ordinals))
        self.chains[worker] = WindowChain(
            worker,
            partial(self._new_gang, worker, ordinal),
            partial(self._window_seconds, worker),
            lambda sequence: self._live[sequence].remaining,
            self._config.window_steps,
        )

    def remove(self, worker: str) -> Iterator[Command]:
        """A worker is gone: its windows end everywhere."""
        for gang in self.chains.pop(worker).gangs():
            yield from self._gangs.abandon(gang, f"home {worker} is gone")

    def holder_lost(self, worker: str, lost: Collection[int]) -> Iterator[Command]:
        """A worker that held blocks for others is gone: they go on without the sequences that are ``lost`` with it."""
        for chain in self.chains.values():
            if any(holder.worker == worker for holder in chain.holders()):
                yield from self.restart(chain, f"holder {worker} is gone", but=lost)

    # Sequences

    def join(self, live: Live) -> Iterator[Command]:
        """A sequence is ready to decode: its home gets its committed state, and begins with its next window."""
        account = self._ledger.sequences[live.sequence]
        placement = self._placement(live.sequence)
        holders = tuple(self._ledger.holders(placement, but=account.home))
        yield Join(account.home, live.state_at(placement, account.length), holders)
        yield from self.chains[account.home].join(live.sequence, holders)

    def leave(self, sequence: int) -> None:
        """A sequence decodes no more, if it did."""
        chain = self.chains.get(self._ledger.sequences[sequence].home)
        if chain is not None:
            chain.leave(sequence)

    # Windows

    def restart(self, chain: WindowChain, reason: str, but: Collection[int]) -> Iterator[Command]:
        """Abort a home's windows and begin a new chain with the committed state of its sequences (but some)."""
        again = [number for number in chain.sequences if number not in but]
        yield from chain.break_(reason, self._ledger.workers.__contains__)
        for sequence in again:
            yield from self.join(self._live[sequence])

    def late(self, now: float) -> Iterator[tuple[Gang, GangAbortedError]]:
        """Windows that should have started long ago, and why that may be."""
        limit = self._config.timeout_start
        for chain in list(self.chains.values()):
            gang = chain.late(now, limit)
            if gang is not None:
                yield gang, not_started(chain.home, f"window {gang.name}", limit)

    def count_tasks(self) -> None:
        """Tell the pacer how many tasks one window of each home takes now."""
        self._pacer.rounds[self._engine] = sum(chain.tasks for chain in self.chains.values())

    def _window_seconds(self, home: str) -> float:
        """Length of a home's next window."""
        self.count_tasks()
        watched = (
            next(self._queue.turns(), None) is not None  # for room, which sequences that stop will free
            or any(self._live[sequence].streamed for sequence in self.chains[home].sequences)
            or self._prefilling.awaited_by(home)
        )
        return self._pacer.window_seconds(self._pace, watched)

    def _new_gang(self, home: str, ordinal: int, window: int, epoch: int, holders: tuple[Endpoint, ...]) -> Gang:
        return self._gangs.new("decode", ordinal, window, epoch, home, holders)
