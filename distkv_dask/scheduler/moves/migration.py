"""Moves of live sequences' blocks: reserved at the target, copied while decoding runs, switched over between windows.

Full, committed blocks never change, so they are copied while their sequence decodes. Others, mainly the tail's, are
moved only from a leaving worker: the sequence pauses between two windows. The policy decides what moves.

One move goes through: Expect (the target allocates, or refuses) -> Send (the source copies) -> Relocate (the home uses
the new placement from its next window on, and reports when no window uses the old one) -> Free (at the source). One
with a pause: Expect -> Retire (home and source stop computing on the sequence) -> Send -> Join (at the home) and Free.
If homes have state besides KV, and the home moves, Store (at the source) and Fetch (at the target) come between.
"""

from __future__ import annotations

from collections.abc import Collection

from distkv_dask.messages.from_worker import Expected, Fetched, Relocated, Retired, Sent, Stored
from distkv_dask.messages.names import OWN_DISK, Saved, SpilledFile, Transfer
from distkv_dask.messages.to_worker import Discard, Expect, Fetch, Free, Keep, Relocate, Send, Store
from distkv_dask.placement import Move
from distkv_dask.scheduler.cache import prefix_cache, snapshots
from distkv_dask.scheduler.commands import Note
from distkv_dask.scheduler.records import states
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.moves import UnderWay
from distkv_dask.scheduler.work import homes

COPYING = ("sending", "writing", "reading")
"""Phases of a move in which blocks, or a home's state, go to the target."""

# What may move


def can_start(life: MachineState, move: Move, *, pause: bool = False) -> bool:
    """Whether a move can start now, with or without a pause: the state may have changed since it was proposed."""
    request, moves = life.requests.get(move.sequence), life.moves
    if request is None or not isinstance(request.state, states.Decode | states.Stored):
        return False
    if moves.busy(move.source) or moves.busy(move.target) or moves.of(move.sequence):
        return False
    return (pause or move.stop <= full_tokens(life, move.sequence)) and not life.ledger.objection(move)


def full_tokens(life: MachineState, sequence: int) -> int:
    """Tokens of a sequence in full, committed blocks, which never change; the tail's last block is excluded."""
    account, size = life.ledger.sequences[sequence], life.ledger.block_tokens
    if account.idle:
        return account.length
    return min(account.length, account.stop - 1) // size * size


# Events


def start(life: MachineState, move: Move) -> None:
    """Begin a move that :func:`can_start`."""
    life.ledger.start_move(move)
    number, pauses = next(life.numbers), move.stop > full_tokens(life, move.sequence)
    late = life.now + life.config.timeout_receive
    life.moves.under_way[number] = UnderWay(number, move, pauses, late)
    prefix_cache.make_room(life, move.target)
    life.command(Expect(move.target, Transfer("move", number), move.sequence, move.start, move.stop))


def expected(life: MachineState, event: Expected) -> None:
    """The target allocated the blocks, or refused: then the move is dropped."""
    one = life.moves.under_way.get(event.transfer.number)
    if one is None or one.phase != "expecting":
        return
    if event.refusal:
        _give_up(life, one)
    elif one.pauses:
        home = life.ledger.sequences[one.move.sequence].home
        one.phase = "pausing"
        one.computing = list(dict.fromkeys((home, one.move.source)))
        homes.leave(life, one.move.sequence)
        life.command(life.requests[one.move.sequence].retire(home))
    else:
        _send(life, one)


def paused(life: MachineState, event: Retired) -> None:
    """A worker stopped computing on a sequence, first its home, then the source: its blocks no longer change."""
    for one in life.moves.of(event.sequence):
        if one.phase not in ("pausing", "resuming") or one.computing[:1] != [event.worker]:
            continue
        del one.computing[0]
        if one.phase == "resuming":
            del life.moves.under_way[one.number]
            homes.join(life, life.requests[event.sequence])
        elif one.computing:
            life.command(life.requests[event.sequence].retire(one.computing[0]))
        else:
            _send(life, one)


def sent(life: MachineState, event: Sent) -> None:
    """The source copied all blocks, or could not."""
    one = life.moves.under_way.get(event.transfer.number)
    if one is None or one.phase != "sending":
        return
    if event.failure:
        _give_up(life, one)
    elif _hands_over(life, one.move):
        _write(life, one)
    elif one.pauses or life.ledger.sequences[one.move.sequence].idle:
        _arrive(life, one)
    else:
        one.phase = "switching"
        sequence, home = one.move.sequence, life.ledger.sequences[one.move.sequence].home
        placement, holders = homes.placed(life, sequence)
        life.command(Relocate(home, one.number, sequence, placement, holders))
        homes.attend(life, home, sequence, holders)


def stored(life: MachineState, event: Stored) -> bool:
    """A home wrote its state of a moving sequence, or could not; False if no move waits for that."""
    for one in life.moves.under_way.values():
        if one.phase != "writing" or one.handed != event.transfer.number:
            continue
        if event.error is not None:
            _give_up(life, one)
            return True
        files = tuple(SpilledFile(*file, event.worker) for file in event.files)
        life.moves.handed[one.number] = event.worker, tuple(file.name for file in files)
        move, account = one.move, life.ledger.sequences[one.move.sequence]
        one.phase, one.late = "reading", life.now + life.config.timeout_start
        life.command(Fetch(move.target, move.sequence, (), Saved(OWN_DISK, files), account.length))
        return True
    return False


def fetched(life: MachineState, event: Fetched) -> None:
    """The new home has read the old one's state, or could not; or the move no longer needs it."""
    reading = [one for one in life.moves.of(event.sequence) if one.phase == "reading"]
    account = life.ledger.sequences.get(event.sequence)
    for one in reading:
        if one.move.target == event.worker and event.error is None:
            _arrive(life, one)
            return
        if one.move.target == event.worker:
            _give_up(life, one)
    in_vain = event.worker in life.ledger.workers and (account is None or account.home != event.worker)
    if life.ledger.has_states and in_vain:
        life.command(Keep(event.worker, event.sequence, (), True))


def relocated(life: MachineState, event: Relocated) -> None:
    """No window of the home uses the old placement now."""
    one = life.moves.under_way.get(event.number)
    if one is not None and one.phase == "switching":
        _finish(life, one)


def worker_lost(life: MachineState, worker: str, lost: Collection[int]) -> None:
    """Drop the moves to a worker that is gone; sequences that paused for one continue, unless they are ``lost``."""
    life.moves.step_seconds.pop(worker, None)
    for one in [one for one in life.moves.under_way.values() if one.move.target == worker]:
        if one.phase == "pausing":
            one.phase = "resuming"
            continue
        del life.moves.under_way[one.number]
        if one.pauses and one.phase in COPYING and one.move.sequence not in lost:
            homes.join(life, life.requests[one.move.sequence])


def expire(life: MachineState) -> None:
    """Drop moves that take too long, but never during a switch, since the home may have made it."""
    for one in list(life.moves.under_way.values()):
        if one.late < life.now and one.phase in ("expecting", *COPYING):
            _give_up(life, one)
    for number in life.moves.handed.keys() - life.moves.under_way.keys():
        worker, names = life.moves.handed.pop(number)
        if worker in life.ledger.workers:
            life.command(Discard(worker, names))


def _send(life: MachineState, one: UnderWay) -> None:
    """Copy what is filled of the blocks, at a rate that overlaps with the steps of all workers involved."""
    move, account = one.move, life.ledger.sequences[one.move.sequence]
    members = {move.source, move.target, account.home} & life.chains.keys()
    steps = [life.moves.step_seconds.get(home, 0.0) for home in members if life.chains[home].sequences]
    pace = 0.0 if one.pauses else max(steps, default=0.0)
    stop = max(move.start, min(move.stop, account.length))
    one.phase = "sending"
    seconds = pace * (stop - move.start) / life.config.move_tokens_per_step
    one.late = life.now + life.config.timeout_start + 4 * seconds
    text = f"tokens {move.start} to {stop} of sequence {move.sequence} from {move.source} to {move.target}"
    life.command(Note("move", text))
    life.command(Send(move.source, Transfer("move", one.number), move.sequence, move.start, stop, move.target, pace))


def _hands_over(life: MachineState, move: Move) -> bool:
    """Whether a home with state of a sequence moves; of a document it may lack the state at its end."""
    account = life.ledger.sequences[move.sequence]
    if not life.ledger.has_states or move.stop < account.stop or not account.length:
        return False
    return not account.idle or account.length in life.snapshots.of.get(move.sequence, ())


def _write(life: MachineState, one: UnderWay) -> None:
    """Let the home write its state."""
    move, account = one.move, life.ledger.sequences[one.move.sequence]
    life.disks.spills += 1
    one.handed, one.phase, one.late = -life.disks.spills, "writing", life.now + life.config.timeout_start
    saved = Saved(OWN_DISK, tag=f"{move.sequence}{one.handed}")
    life.command(Store(move.source, Transfer("state", one.handed), move.sequence, (), saved, account.length))


def _arrive(life: MachineState, one: UnderWay) -> None:
    """Everything has arrived at the target of a move whose sequence was paused, or is idle."""
    _finish(life, one)
    if not life.ledger.sequences[one.move.sequence].idle:
        homes.join(life, life.requests[one.move.sequence])


def _finish(life: MachineState, one: UnderWay) -> None:
    move, account = one.move, life.ledger.sequences[one.move.sequence]
    del life.moves.under_way[one.number]
    life.ledger.finish_move(move)
    life.moves.moved_blocks += life.ledger.blocks(move.tokens)
    life.command(Free(move.source, move.sequence, move.start, move.stop))
    if life.ledger.has_states and move.stop == account.stop:
        snapshots.drop(life, move.sequence)
        life.command(Keep(move.source, move.sequence, (), True))
        if account.idle and one.handed:
            life.snapshots.add(move.sequence, account.length, move.target)
        snapshots.make_room(life, move.target)


def _give_up(life: MachineState, one: UnderWay) -> None:
    move, was_paused = one.move, one.pauses and one.phase in COPYING
    del life.moves.under_way[one.number]
    life.ledger.cancel_move(move)
    life.command(Free(move.target, move.sequence, move.start, move.stop))
    if one.phase == "reading":
        life.command(Keep(move.target, move.sequence, (), True))
    if was_paused:
        homes.join(life, life.requests[move.sequence])
