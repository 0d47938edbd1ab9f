"""Retrying: a gang failed while all its workers live, as far as the scheduler knows, so it is tried again.

A few times at once, then with pauses for as long as a peer may be silent: a network that is cut comes back, and of a
worker that died while it was cut off, the scheduler hears later than those who try to reach it. Pure: commands come
out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from distkv_dask.errors import GangAbortedError, PlanError, without_quotes
from distkv_dask.scheduler.commands import Command
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.lifecycle.ends import Ending
from distkv_dask.scheduler.lifecycle.request import Live
from distkv_dask.scheduler.work.homes import Homes
from distkv_dask.scheduler.work.prefill import Prefilling
from distkv_dask.scheduler.work.windows import WindowChain

MAX_RETRIES = 2
"""How often a gang that failed without losing a worker is tried again at once, and before its requests may fail."""

PAUSE = 1.0
"""Seconds before it is tried again after that."""


class Retrying:
    """Sees to one engine's gangs.

    Parameters
    ----------
    ledger, live, homes, prefilling, ending
        The lifecycle's.
    patience
        Seconds in which gangs are tried again.
    """

    def __init__(
        self,
        ledger: Ledger,
        live: Mapping[int, Live],
        homes: Homes,
        prefilling: Prefilling,
        ending: Ending,
        patience: float,
    ) -> None:
        self._ledger = ledger
        self._live = live
        self._homes = homes
        self._prefilling = prefilling
        self._ending = ending
        self._patience = patience
        self._resting: dict[int, float] = {}

    def failed(self, gang: int, error: Exception, now: float) -> Iterator[Command]:
        """A member of a gang failed: its chunk or its home's windows begin anew, or its requests fail with it."""
        again = isinstance(error, (GangAbortedError, ConnectionError))
        for live in self._live.values():
            if gang in live.chunks:
                yield from self._prefill_failed(live, error, again, now)
                return
        for chain in self._homes.chains.values():
            if any(one.number == gang for one in chain.gangs()):
                yield from self._window_failed(chain, error, again, now)
                return

    def _window_failed(self, chain: WindowChain, error: Exception, again: bool, now: float) -> Iterator[Command]:
        """Begin a home's windows anew, in a while if that did not help; fail those of its sequences that may be why."""
        chain.failing_since = chain.failing_since if chain.failures else now
        chain.failures += 1
        failed = self._to_blame(chain, error)
        if failed:
            chain.failures -= 1
        elif not (again or isinstance(error, PlanError)) or self._is_hopeless(chain.failures, chain.failing_since, now):
            failed = [sequence for sequence, holders in chain.sequences.items() if holders] or [*chain.sequences]
            chain.failures = 0
        elif chain.failures > MAX_RETRIES:
            chain.rests_until = now + PAUSE
        yield from self._homes.restart(chain, without_quotes(error), but=failed)
        for sequence in failed:
            yield from self._ending.end(sequence, "error", now, error)

    def _to_blame(self, chain: WindowChain, error: Exception) -> list[int]:
        """Sequences of a home whose own plan is the reason: those that decode with them go on without them."""
        if not isinstance(error, PlanError):
            return []
        return [one for one in chain.sequences if error.sequence in (one, self._live[one].document)]

    def _prefill_failed(self, live: Live, error: Exception, again: bool, now: float) -> Iterator[Command]:
        live.failing_since = live.failing_since if live.retries else now
        live.retries += 1
        if not again or self._is_hopeless(live.retries, live.failing_since, now):
            yield from self._ending.end(live.sequence, "error", now, error)
        elif live.retries > MAX_RETRIES:
            yield from self._prefilling.stop(live, without_quotes(error))
            self._resting[live.sequence] = now + PAUSE
        else:
            yield from self._prefilling.again(live, without_quotes(error))

    def _is_hopeless(self, failures: int, since: float, now: float) -> bool:
        return failures > MAX_RETRIES and now - since >= self._patience

    def wake(self, now: float) -> Iterator[Command]:
        """Try again what has rested."""
        for chain in self._homes.chains.values():
            if chain.rests_until is not None and chain.rests_until <= now:
                chain.rests_until = None
                yield from chain.pump()
        for sequence in [one for one, until in self._resting.items() if until <= now]:
            del self._resting[sequence]
            live = self._live.get(sequence)
            if live is not None and live.state == "prefill" and not live.chunks:  # else it ended, or lost a worker
                yield self._prefilling.begin(live, self._ledger.sequences[sequence].length)
