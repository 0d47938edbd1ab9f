"""Retries: a gang that failed although all its workers seem to be alive is tried again.

A few times at once, then with pauses for as long as a peer may be silent: a cut network recovers, and the scheduler
learns of a dead worker later than its peers.
"""

from __future__ import annotations

from distkv_dask.errors import DeviceMemoryError, GangAbortedError, PlanError, without_quotes
from distkv_dask.scheduler.lifecycle.ends import end
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.request import Request
from distkv_dask.scheduler.records.states import Prefill
from distkv_dask.scheduler.records.window_chain import WindowChain
from distkv_dask.scheduler.work import homes, prefill

MAX_RETRIES = 2
"""How often a gang that failed without losing a worker is tried again at once, and before its requests may fail."""

PAUSE = 1.0
"""Seconds before it is tried again after that."""


def owner(life: MachineState, gang: int) -> Request | WindowChain | None:
    """The owner of a gang, if its chunk or window is still expected."""
    for sequence in life.in_prefill:
        request = life.requests[sequence]
        if isinstance(request.state, Prefill) and gang in request.state.chunks:
            return request
    chains = (chain for chain in life.chains.values() if any(one.number == gang for one in chain.gangs()))
    return next(chains, None)


def failed(life: MachineState, gang: int, error: Exception) -> None:
    """A member of a gang failed: its chunk or its home's windows start over, or its requests fail with it."""
    again = isinstance(error, GangAbortedError | ConnectionError | DeviceMemoryError)
    match owner(life, gang):
        case Request() as request:
            _prefill_failed(life, request, error, again)
        case WindowChain() as chain:
            _window_failed(life, chain, error, again)


def _window_failed(life: MachineState, chain: WindowChain, error: Exception, again: bool) -> None:
    """Restart a home's windows, later if that did not help; fail the sequences that may be the cause."""
    chain.failing_since = chain.failing_since if chain.failures else life.now
    chain.failures += 1
    blamed = _to_blame(life, chain, error)
    if blamed:
        chain.failures -= 1
    elif not (again or isinstance(error, PlanError)) or _is_hopeless(life, chain.failures, chain.failing_since):
        blamed = [sequence for sequence, holders in chain.sequences.items() if holders] or [*chain.sequences]
        chain.failures = 0
    elif chain.failures > MAX_RETRIES:
        chain.rests_until = life.now + PAUSE
    homes.restart(life, chain, without_quotes(error), but=blamed)
    for sequence in blamed:
        end(life, life.requests[sequence], "error", error)


def _to_blame(life: MachineState, chain: WindowChain, error: Exception) -> list[int]:
    """Sequences of a home with a faulty plan: those that decode with them continue without them."""
    if not isinstance(error, PlanError):
        return []
    return [one for one in chain.sequences if error.sequence in (one, life.requests[one].document)]


def _prefill_failed(life: MachineState, request: Request, error: Exception, again: bool) -> None:
    state = request.state
    assert isinstance(state, Prefill)
    state.failed(life.now)
    if not again or _is_hopeless(life, state.failures, state.failing_since):
        end(life, request, "error", error)
        return
    prefill.stop_prefill(life, request, without_quotes(error))
    if state.failures > MAX_RETRIES:
        state.rest(life.now + PAUSE)
    else:
        prefill.resubmit_chunks(life, request)


def _is_hopeless(life: MachineState, failures: int, since: float) -> bool:
    return failures > MAX_RETRIES and life.now - since >= life.config.timeout_receive


def retry_rested(life: MachineState) -> None:
    """Retry after a pause."""
    for chain in life.chains.values():
        if chain.rests_until is not None and chain.rests_until <= life.now:
            chain.rests_until = None
            life.idle_homes[chain.home] = None
    for request in life.requests.values():
        state = request.state
        if isinstance(state, Prefill) and state.rests_until is not None and state.rests_until <= life.now:
            prefill.resubmit_chunks(life, request)
