"""Moves of live sequences' blocks: reserved at the target, copied while decoding runs, switched over between windows.

Blocks that are full and committed never change, so they are copied without stopping anybody. Others, the tail's above
all, are moved only from a worker that leaves: the sequence pauses between two windows. Pure: events and times go in,
commands come out. What to move is not decided here.

One move goes through: EXPECT (the target allocates, or refuses) -> SEND (the source copies) -> RELOCATE (the home uses
the new placement from its next window on, and says when no window uses the old one) -> FREE (at the source). One with a
pause: EXPECT -> RETIRE (home and source compute on the sequence no more) -> SEND -> JOIN (at the home) and FREE.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from distkv_dask.config import Config
from distkv_dask.scheduler.commands import Command, Expect, Free, Relocate, Send
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.ledger.placements import moved
from distkv_dask.scheduler.lifecycle.request import Live
from distkv_dask.scheduler.work.homes import Homes
from distkv_dask.types import Move, Placement


@dataclass(slots=True)
class _UnderWay:
    """A move on its way; ``late`` is the time after which it is given up.

    With a pause, ``computing`` are the workers that may still compute on the sequence.
    """

    number: int
    move: Move
    pauses: bool
    late: float
    state: Literal["expecting", "pausing", "sending", "switching", "resuming"] = "expecting"
    computing: list[str] = field(default_factory=list)


class Moving:
    """Moves under way of one engine: at most one for each sequence, source and target.

    Parameters
    ----------
    ledger, live, homes
        The lifecycle's.
    config
        Pace and limits in time.
    make_room
        Makes sure that a worker's pool has the room that the ledger reserved there.
    numbers
        Gives each move a number that no other has.
    """

    def __init__(
        self,
        ledger: Ledger,
        live: Mapping[int, Live],
        homes: Homes,
        config: Config,
        make_room: Callable[[str], Iterator[Command]],
        numbers: Iterator[int],
    ) -> None:
        self._ledger = ledger
        self._live = live
        self._homes = homes
        self._config = config
        self._make_room = make_room
        self._numbers = numbers
        self._moves: dict[int, _UnderWay] = {}
        self._step_seconds: dict[str, float] = {}
        self.moved_blocks = 0
        """Blocks that have changed their worker."""

    # What may move

    def can_start(self, move: Move, *, pause: bool = False) -> bool:
        """Whether a move can start now, without a pause or with one: its proposer may have seen another state."""
        live = self._live.get(move.sequence)
        if live is None or live.state not in ("decode", "document"):
            return False
        if any(map(self.busy, (move.source, move.target))):
            return False
        if any(one.move.sequence == move.sequence for one in self._moves.values()):
            return False
        return (pause or move.stop <= self.full_tokens(move.sequence)) and not self._ledger.objection(move)

    def full_tokens(self, sequence: int) -> int:
        """Tokens of a sequence that lie in full, committed blocks, which never change; the tail's last block is not."""
        account, size = self._ledger.sequences[sequence], self._ledger.block_tokens
        if account.idle:
            return account.length
        return min(account.length, account.stop - 1) // size * size

    def busy(self, worker: str) -> bool:
        """Whether a worker sends or receives blocks."""
        return any(worker in (one.move.source, one.move.target) for one in self._moves.values())

    def placement(self, sequence: int) -> Placement:
        """Where the home of a sequence looks for its blocks: the ledger's placement, or the one it switches to."""
        account = self._ledger.sequences[sequence]
        for one in self._moves.values():
            if one.move.sequence == sequence and one.state == "switching":
                return moved(account.placement, one.move, self._ledger.block_tokens)
        return account.placement

    # Events

    def start(self, move: Move, now: float) -> Iterator[Command]:
        """Begin a move that :meth:`can_start`."""
        self._ledger.start_move(move)
        number, pauses = next(self._numbers), move.stop > self.full_tokens(move.sequence)
        self._moves[number] = _UnderWay(number, move, pauses, now + self._config.timeout_receive)
        yield from self._make_room(move.target)
        yield Expect(move.target, number, move.sequence, move.start, move.stop)

    def expected(self, number: int, refusal: str, now: float) -> Iterator[Command]:
        """The target allocated the blocks, or refused: then nothing else is tried, the next plan knows better."""
        one = self._moves.get(number)
        if one is None or one.state != "expecting":
            return
        if refusal:
            yield from self._give_up(one)
        elif one.pauses:
            home = self._ledger.sequences[one.move.sequence].home
            one.state = "pausing"
            one.computing = list(dict.fromkeys((home, one.move.source)))
            self._homes.leave(one.move.sequence)
            yield self._live[one.move.sequence].retire(home)
        else:
            yield self._send(one, now)

    def paused(self, sequence: int, worker: str, now: float) -> Iterator[Command]:
        """A worker computes on a sequence no more, first its home, then the source: now nothing changes its blocks."""
        for one in list(self._moves.values()):
            if one.move.sequence != sequence or one.state not in ("pausing", "resuming"):
                continue
            if one.computing[:1] == [worker]:
                del one.computing[0]
            if one.state == "resuming":
                del self._moves[one.number]
                yield from self._homes.join(self._live[sequence])
            elif one.computing:
                yield self._live[sequence].retire(one.computing[0])
            else:
                yield self._send(one, now)

    def sent(self, number: int, failure: str, now: float) -> Iterator[Command]:
        """The source copied all blocks, or could not."""
        one = self._moves.get(number)
        if one is None or one.state != "sending":
            return
        if failure:
            yield from self._give_up(one)
        elif self._ledger.sequences[one.move.sequence].idle:
            yield from self._finish(one)
        elif one.pauses:
            yield from self._finish(one)
            yield from self._homes.join(self._live[one.move.sequence])
        else:
            one.state = "switching"
            move, home = one.move, self._ledger.sequences[one.move.sequence].home
            placement = self.placement(move.sequence)
            holders = tuple(self._ledger.holders(placement, but=home))
            yield Relocate(home, number, move.sequence, placement, holders)
            yield from self._homes.chains[home].join(move.sequence, holders)

    def relocated(self, number: int) -> Iterator[Command]:
        """No window of the home uses the old placement any more."""
        one = self._moves.get(number)
        if one is not None and one.state == "switching":
            yield from self._finish(one)

    def forget(self, sequence: int) -> None:
        """A sequence ended; its blocks are released at the target too, which takes no more of them then."""
        self._moves = {number: one for number, one in self._moves.items() if one.move.sequence != sequence}

    def worker_lost(self, worker: str, lost: Collection[int]) -> Iterator[Command]:
        """Give up the moves to a worker that is gone. What was to switch, or is ``lost``, is not seen to."""
        self._step_seconds.pop(worker, None)
        for one in [one for one in self._moves.values() if one.move.target == worker]:
            if one.state == "pausing":
                one.state = "resuming"
                continue
            del self._moves[one.number]
            if one.pauses and one.state == "sending" and one.move.sequence not in lost:
                yield from self._homes.join(self._live[one.move.sequence])

    def expire(self, now: float) -> Iterator[Command]:
        """Give up moves that take too long; a switch is never given up, since the home may have made it."""
        for one in [one for one in self._moves.values() if one.late < now and one.state in ("expecting", "sending")]:
            yield from self._give_up(one)

    def stepped(self, home: str, seconds: float) -> None:
        """A home's decode steps take so long."""
        self._step_seconds[home] = seconds

    def _send(self, one: _UnderWay, now: float) -> Send:
        """Copy what is filled of the blocks, at a pace that hides under the steps of all who take part."""
        move, account = one.move, self._ledger.sequences[one.move.sequence]
        chains = self._homes.chains
        homes = {move.source, move.target, account.home} & chains.keys()
        steps = [self._step_seconds.get(home, 0.0) for home in homes if chains[home].sequences]
        pace = 0.0 if one.pauses else max(steps, default=0.0)
        stop = max(move.start, min(move.stop, account.length))
        one.state = "sending"
        seconds = pace * (stop - move.start) / self._config.move_tokens_per_step
        one.late = now + self._config.timeout_start + 4 * seconds
        return Send(move.source, one.number, move.sequence, move.start, stop, move.target, pace)

    def _finish(self, one: _UnderWay) -> Iterator[Command]:
        move = one.move
        del self._moves[one.number]
        self._ledger.finish_move(move)
        self.moved_blocks += self._ledger.blocks(move.tokens)
        yield Free(move.source, move.sequence, move.start, move.stop)

    def _give_up(self, one: _UnderWay) -> Iterator[Command]:
        move, paused = one.move, one.pauses and one.state == "sending"
        del self._moves[one.number]
        self._ledger.cancel_move(move)
        yield Free(move.target, move.sequence, move.start, move.stop)
        if paused:
            yield from self._homes.join(self._live[move.sequence])
