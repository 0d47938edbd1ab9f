"""Moves of live sequences' blocks: reserved at the target, copied while decoding runs, switched over between windows.

Full, committed blocks never change, so they are copied while their sequence decodes. Others, mainly the tail's, are
moved only from a leaving worker: the sequence pauses between two windows. The policy decides what moves.

One move goes through: Expect (the target allocates, or refuses) -> Send (the source copies) -> Relocate (the home uses
the new placement from its next window on, and reports when no window uses the old one) -> Free (at the source). One
with a pause: Expect -> Retire (home and source stop computing on the sequence) -> Send -> Join (at the home) and Free.
"""

from __future__ import annotations

from collections.abc import Collection

from distkv_dask.messages.from_worker import Expected, Relocated, Retired, Sent
from distkv_dask.messages.to_worker import Expect, Free, Relocate, Send
from distkv_dask.placement import Move
from distkv_dask.scheduler.cache import prefix_cache
from distkv_dask.scheduler.commands import Note
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.moves import UnderWay
from distkv_dask.scheduler.records.states import Decode, Stored
from distkv_dask.scheduler.work import homes

# What may move


def can_start(life: MachineState, move: Move, *, pause: bool = False) -> bool:
    """Whether a move can start now, with or without a pause: the state may have changed since it was proposed."""
    request, moves = life.requests.get(move.sequence), life.moves
    if request is None or not isinstance(request.state, Decode | Stored):
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
    life.command(Expect(move.target, number, move.sequence, move.start, move.stop))


def expected(life: MachineState, event: Expected) -> None:
    """The target allocated the blocks, or refused: then the move is dropped."""
    one = life.moves.under_way.get(event.number)
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
    one = life.moves.under_way.get(event.number)
    if one is None or one.phase != "sending":
        return
    if event.failure:
        _give_up(life, one)
    elif life.ledger.sequences[one.move.sequence].idle:
        _finish(life, one)
    elif one.pauses:
        _finish(life, one)
        homes.join(life, life.requests[one.move.sequence])
    else:
        one.phase = "switching"
        sequence, home = one.move.sequence, life.ledger.sequences[one.move.sequence].home
        placement, holders = homes.placed(life, sequence)
        life.command(Relocate(home, one.number, sequence, placement, holders))
        homes.attend(life, home, sequence, holders)


def relocated(life: MachineState, event: Relocated) -> None:
    """No window of the home uses the old placement now."""
    one = life.moves.under_way.get(event.number)
    if one is not None and one.phase == "switching":
        _finish(life, one)


def worker_lost(life: MachineState, worker: str, lost: Collection[int]) -> None:
    """Give up the moves to a worker that is gone. What was to switch, or is ``lost``, is not seen to."""
    life.moves.step_seconds.pop(worker, None)
    for one in [one for one in life.moves.under_way.values() if one.move.target == worker]:
        if one.phase == "pausing":
            one.phase = "resuming"
            continue
        del life.moves.under_way[one.number]
        if one.pauses and one.phase == "sending" and one.move.sequence not in lost:
            homes.join(life, life.requests[one.move.sequence])


def expire(life: MachineState) -> None:
    """Give up moves that take too long; a switch is never given up, since the home may have made it."""
    for one in list(life.moves.under_way.values()):
        if one.late < life.now and one.phase in ("expecting", "sending"):
            _give_up(life, one)


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
    life.command(Send(move.source, one.number, move.sequence, move.start, stop, move.target, pace))


def _finish(life: MachineState, one: UnderWay) -> None:
    move = one.move
    del life.moves.under_way[one.number]
    life.ledger.finish_move(move)
    life.moves.moved_blocks += life.ledger.blocks(move.tokens)
    life.command(Free(move.source, move.sequence, move.start, move.stop))


def _give_up(life: MachineState, one: UnderWay) -> None:
    move, was_paused = one.move, one.pauses and one.phase == "sending"
    del life.moves.under_way[one.number]
    life.ledger.cancel_move(move)
    life.command(Free(move.target, move.sequence, move.start, move.stop))
    if was_paused:
        homes.join(life, life.requests[move.sequence])
