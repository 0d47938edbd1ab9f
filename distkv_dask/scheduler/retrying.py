"""Retrying: a gang failed while all its workers live, so it is tried again a few times. Pure: commands come out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from distkv_dask.errors import GangAbortedError
from distkv_dask.scheduler.commands import Command
from distkv_dask.scheduler.ending import Ending
from distkv_dask.scheduler.homes import Homes
from distkv_dask.scheduler.live import Live
from distkv_dask.scheduler.prefilling import Prefilling

MAX_RETRIES = 2
"""How often a gang that failed without losing a worker is tried again before its requests fail."""


class Retrying:
    """Sees to one engine's gangs.

    Parameters
    ----------
    live, homes, prefilling, ending
        The lifecycle's.
    """

    def __init__(self, live: Mapping[int, Live], homes: Homes, prefilling: Prefilling, ending: Ending) -> None:
        self._live = live
        self._homes = homes
        self._prefilling = prefilling
        self._ending = ending

    def failed(self, gang: int, error: Exception, now: float) -> Iterator[Command]:
        """A member of a gang failed: its chunk or its home's windows begin anew, or its requests fail with it."""
        again = isinstance(error, (GangAbortedError, ConnectionError))
        for live in self._live.values():
            if gang in live.chunks:
                yield from self._prefill_failed(live, error, again, now)
                return
        for chain in self._homes.chains.values():
            if any(one.number == gang for one in chain.gangs()):
                chain.failures += 1
                failed = [] if again and chain.failures <= MAX_RETRIES else list(chain.sequences)
                yield from self._homes.restart(chain, str(error), but=failed)
                for sequence in failed:
                    yield from self._ending.end(sequence, "error", now, error)
                if failed:
                    chain.failures = 0
                return

    def _prefill_failed(self, live: Live, error: Exception, again: bool, now: float) -> Iterator[Command]:
        if not again or live.retries >= MAX_RETRIES:
            yield from self._ending.end(live.sequence, "error", now, error)
            return
        live.retries += 1
        yield from self._prefilling.again(live, str(error))
