"""Homes: the workers of an engine that decode, each with a chain of windows, which sequences join and leave.

A sequence joins with the next window that starts; its holders are added to windows that are queued already. How long
the next window is depends on what waits for its end (:mod:`~distkv_dask.scheduler.costs.pacer`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from distkv_dask.errors import GangAbortedError
from distkv_dask.gang import DecodeWindow, Gang
from distkv_dask.messages.from_worker import WindowDone
from distkv_dask.messages.to_worker import Abort, Join, Reset
from distkv_dask.placement import Endpoint, Placement
from distkv_dask.scheduler.commands import AddHolders, ForgetTasks, SubmitWindow
from distkv_dask.scheduler.costs.pacer import Pace
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.request import Request
from distkv_dask.scheduler.records.starts import not_started
from distkv_dask.scheduler.records.states import State
from distkv_dask.scheduler.records.window_chain import PATIENCE, Outstanding, WindowChain
from distkv_dask.scheduler.work.chunks import next_chunks
from distkv_dask.scheduler.work.gangs import abandon, new_gang
from distkv_dask.scheduler.work.prefill import is_awaited_by

# Workers


def add(life: MachineState, worker: str) -> None:
    """A worker may become the home of sequences."""
    life.ordinals.setdefault(worker, len(life.ordinals))
    life.chains[worker] = WindowChain(worker)


def remove(life: MachineState, worker: str) -> None:
    """A worker is gone: its windows end everywhere."""
    for gang in life.chains.pop(worker).gangs():
        abandon(life, gang, f"home {worker} is gone")


def holder_lost(life: MachineState, worker: str, lost: Collection[int]) -> None:
    """A worker that held blocks for others is gone: they continue without the ``lost`` sequences."""
    for chain in life.chains.values():
        if any(holder.worker == worker for holder in chain.holders()):
            restart(life, chain, f"holder {worker} is gone", but=lost)


# Sequences


def join(life: MachineState, request: Request) -> None:
    """Start decoding a sequence: send its committed state to its home, which includes it in its next window."""
    account = life.ledger.sequences[request.sequence]
    placement, holders = placed(life, request.sequence)
    state = request.state_at(placement, account.length, life.speculates)
    life.command(Join(account.home, state, holders))
    attend(life, account.home, request.sequence, holders)


def placed(life: MachineState, sequence: int) -> tuple[Placement, tuple[Endpoint, ...]]:
    """The placement that a sequence's home uses, and the holders that it queries."""
    account = life.ledger.sequences[sequence]
    placement = life.moves.placement(sequence, account.placement, life.ledger.block_tokens)
    return placement, tuple(life.ledger.holders(placement, but=account.home))


def begin_decode(life: MachineState, request: Request, before: State) -> None:
    """A sequence is ready to decode."""
    join(life, request)


def attend(life: MachineState, home: str, sequence: int, holders: tuple[Endpoint, ...]) -> None:
    """Let these holders attend a sequence of a home, from the next window on that starts."""
    chain = life.chains[home]
    chain.sequences[sequence] = holders
    for entry in chain.outstanding.values():
        missing = tuple(holder for holder in holders if holder not in entry.window.gang.holders)
        if missing and not entry.started:
            gang = replace(entry.window.gang, holders=entry.window.gang.holders + missing)
            entry.window = replace(entry.window, gang=gang)
            life.command(AddHolders(gang, missing))
    life.idle_homes[home] = None


def leave(life: MachineState, sequence: int) -> None:
    """Stop decoding a sequence, if it was decoding."""
    chain = life.chains.get(life.ledger.sequences[sequence].home)
    if chain is not None:
        chain.sequences.pop(sequence, None)


# Windows


def window_started(life: MachineState, home: str, window: int) -> None:
    """A home began a window."""
    chain = life.chains.get(home)
    if chain is not None and window in chain.outstanding:
        chain.outstanding[window].started = True
        chain.outstanding[window].batch = frozenset(chain.sequences)
        life.idle_homes[home] = None


def window_done(life: MachineState, event: WindowDone) -> bool:
    """A home finished a window; False if the window is no longer expected."""
    chain = life.chains.get(event.worker)
    if chain is None or chain.epoch != event.epoch or event.window not in chain.outstanding:
        return False
    gang, result = chain.outstanding.pop(event.window).window.gang, event.result
    chain.failures = 0
    if result.steps:
        chain.step_seconds = result.seconds / result.steps
    for holder in gang.holders:
        if holder.worker not in event.used:
            life.command(Abort(holder.worker, gang.number, "no sequence of the window needed this holder", unused=True))
    life.command(ForgetTasks(gang, finished=True))
    life.idle_homes[event.worker] = None
    return True


def fill(life: MachineState) -> None:
    """Keep one window queued behind the running one of each home while there are sequences."""
    homes, life.idle_homes = life.idle_homes, {}
    for home in homes:
        chain = life.chains.get(home)
        if chain is not None and _gathers(life, chain):
            life.idle_homes[home] = None  # checked again at the next event of any kind
            continue
        while chain is not None and chain.needs_window(life.requests):
            _submit(life, chain)


def _gathers(life: MachineState, chain: WindowChain) -> bool:
    """Whether a home delays its sequences because it is computing prompts submitted together with each of them.

    A client that submits a batch waits for its end, and a step hardly takes longer with more sequences. No sequence
    waits for prompts of others, which have another time of submission.
    """
    decoding = [life.requests[sequence] for sequence in chain.sequences]
    if not decoding or any(one.answer.streamed for one in decoding):
        return False
    here = (chunk.sequence for chunk in next_chunks(life) if chunk.gang.home == chain.home)
    coming = {life.requests[sequence].asked.submitted for sequence in here}
    return all(one.asked.submitted in coming for one in decoding)


def _submit(life: MachineState, chain: WindowChain) -> None:
    number, home = chain.submitted, chain.home
    chain.submitted += 1
    holders = tuple({endpoint.worker: endpoint for one in chain.sequences.values() for endpoint in one}.values())
    chain.members = 1 + len(holders)
    chain.seconds = _window_seconds(life, chain)
    gang = new_gang(life, f"decode-{life.ordinals[home]}-{number}", chain.epoch, home, holders)
    window = DecodeWindow(gang, number, life.config.window_steps, chain.seconds)
    before = next(reversed(chain.outstanding.values()), None)
    chain.outstanding[number] = Outstanding(window)
    if before is None:
        life.command(SubmitWindow(window, None))
    else:
        life.command(SubmitWindow(window, before.window.gang, PATIENCE * chain.expected(before.window)))


def restart(life: MachineState, chain: WindowChain, reason: str, but: Collection[int]) -> None:
    """Abort a home's windows and begin a new chain with the committed state of its sequences (but some)."""
    again = [number for number in chain.sequences if number not in but]
    for gang in chain.gangs():
        abandon(life, gang, reason)
    chain.outstanding.clear()
    chain.sequences.clear()
    chain.epoch += 1
    if chain.home in life.ledger.workers:
        life.command(Reset(chain.home, chain.epoch))
    for sequence in again:
        join(life, life.requests[sequence])


def late_windows(life: MachineState) -> list[tuple[Gang, GangAbortedError]]:
    """Windows whose start is overdue, and the likely reason."""
    limit = life.config.timeout_start
    late = [(chain.home, gang) for chain in life.chains.values() if (gang := chain.late(life.now, limit)) is not None]
    return [(gang, not_started(home, f"window {gang.name}", limit)) for home, gang in late]


def count_tasks(life: MachineState) -> None:
    """Update the pacer's number of tasks in one window of each home."""
    life.pacer.rounds[life.engine] = sum(chain.tasks for chain in life.chains.values())


def _window_seconds(life: MachineState, chain: WindowChain) -> float:
    """Length of a home's next window."""
    count_tasks(life)
    watched = (
        next(life.queue.turns(), None) is not None  # it waits for room, which sequences that stop will free
        or any(life.requests[sequence].answer.streamed for sequence in chain.sequences)
        or is_awaited_by(life, chain.home)
    )
    limit = life.config.timeout_start / 2  # holders of the next window wait while this one runs
    pace = Pace(
        watched=min(life.config.window_stream_seconds, limit),
        unwatched=min(life.config.window_seconds, limit),
        longest=min(life.config.window_max_seconds, limit),
        share=life.config.window_scheduler_share,
    )
    return life.pacer.window_seconds(pace, watched)
