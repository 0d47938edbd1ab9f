"""Draining: moves the blocks of leaving workers to others, one move after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set

from distkv_dask.placement import Move, Span
from distkv_dask.scheduler.cache import prefix_cache
from distkv_dask.scheduler.ledger.accounts import SequenceAccount, WorkerAccount
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.moves import migration
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.states import Decode, Dropped, Retiring, Stored
from distkv_dask.scheduler.work import homes


def set_leaving(life: MachineState, worker: str, leaving: bool) -> None:
    """A worker is about to leave, so nothing is placed on it; or it stays after all."""
    (life.leaving.add if leaving else life.leaving.discard)(worker)
    life.ledger.retire_worker(worker, leaving or worker in life.paused)
    life.largest_blocks = max(life.largest_blocks, life.policy.limit(life.ledger))
    prefix_cache.drain(life, worker)


def set_paused(life: MachineState, paused: Set[str]) -> None:
    """Dask starts nothing on these workers, so nothing is placed on them either."""
    known = paused & life.ledger.workers.keys()
    changed, life.paused = life.paused ^ known, set(known)
    for worker in changed & life.ledger.workers.keys():
        life.ledger.retire_worker(worker, worker in life.paused or worker in life.leaving)


def start_moves(life: MachineState) -> None:
    """Start one move from each leaving worker that has blocks and is not part of a move."""
    for worker in sorted(life.leaving):
        if not life.moves.busy(worker):
            _move_away(life, worker)


def _move_away(life: MachineState, worker: str) -> None:
    whole = (n for n in life.ledger.workers[worker].held if not life.ledger.sequences[n].lost)
    held = [n for n in whole if isinstance(life.requests[n].state, Decode | Stored)]
    if life.ledger.has_states:
        stuck = [number for number in held if _fits_no_home(life, number, worker)]
        _recompute_elsewhere(life, stuck)
        held = [number for number in held if number not in stuck]
    full = {number: migration.full_tokens(life, number) for number in held}
    for move, pause in moves_away(life.ledger, worker, full):
        if migration.can_start(life, move, pause=pause):
            migration.start(life, move)
            return


def _recompute_elsewhere(life: MachineState, sequences: Iterable[int]) -> None:
    """Sequences of a leaving home for which no other home has a place wait for one."""
    for number in sequences:
        request, account = life.requests[number], life.ledger.sequences[number]
        if account.moves:
            continue
        if isinstance(request.state, Decode):
            homes.leave(life, number)
            life.recommend(request, Retiring(again=True))
        elif not account.sharers:
            life.recommend(request, Dropped())


def _fits_no_home(life: MachineState, number: int, worker: str) -> bool:
    """Whether a worker is home of a sequence for which no other one has a place, and room for its last blocks."""
    account = life.ledger.sequences[number]
    last = min(account.stop - 1, migration.full_tokens(life, number))
    return account.home == worker and next(_homes(life.ledger, account.stop - last), None) is None


def _homes(ledger: Ledger, tokens: int) -> Iterator[WorkerAccount]:
    """Workers to which a home may move with ``tokens`` tokens."""
    for home in _by_room(ledger.workers.values()):
        fits = home.free >= ledger.blocks(tokens)
        if home.can_decode and not home.retiring and home.has_place and fits:
            yield home


def moves_away(ledger: Ledger, worker: str, full: dict[int, int]) -> Iterator[tuple[Move, bool]]:
    """Moves that would take blocks from a worker, the best first, and whether their sequence has to pause.

    Parameters
    ----------
    ledger
        The ledger.
    worker
        The worker to drain.
    full
        The sequences that can be moved, and how many of their tokens are in full, committed blocks.
    """
    later: list[tuple[Move, bool]] = []
    for sequence, tokens in full.items():
        account = ledger.sequences[sequence]
        for span in account.placement:
            if span.worker != worker or not span.tokens or span.document is not None:
                continue
            stop = min(span.stop, tokens)
            if stop > span.start:
                for target, room in _holders(ledger, account, worker):
                    yield _move(ledger, sequence, Span(worker, span.start, stop), target, room), False
            elif span.stop < account.stop:
                later.extend(
                    (_move(ledger, sequence, span, target, room), True)
                    for target, room in _holders(ledger, account, worker)
                )
            # a home moves with the whole rest of its last span, to a worker with room for it
            if span.stop == account.stop:
                fitting = _homes(ledger, span.tokens)
                later.extend((Move(sequence, span.start, span.stop, worker, one.worker), True) for one in fitting)
    yield from later


def fits_elsewhere(ledger: Ledger, leaving: set[str]) -> bool:
    """Whether the blocks of some workers would fit on the others, including one that can decode."""
    stay = [account for worker, account in ledger.workers.items() if worker not in leaving and not account.retiring]
    blocks = sum(ledger.workers[worker].used for worker in leaving)
    return not blocks or (any(account.can_decode for account in stay) and sum(one.free for one in stay) >= blocks)


def _holders(ledger: Ledger, account: SequenceAccount, worker: str) -> Iterator[tuple[str, int]]:
    """Workers that could take blocks of a sequence, and how many; its home first."""
    home = ledger.workers[account.home]
    if home.worker != worker and home.free and not home.retiring:
        yield home.worker, home.free
    for other in _by_room(ledger.workers.values()):
        if other.worker not in (worker, home.worker) and other.lendable:
            yield other.worker, other.lendable


def _by_room(accounts: Iterable[WorkerAccount]) -> list[WorkerAccount]:
    return sorted(accounts, key=lambda account: (-account.free, account.worker))


def _move(ledger: Ledger, sequence: int, span: Span, target: str, room: int) -> Move:
    """The part of a span that fits."""
    stop = min(span.stop, span.start + room * ledger.block_tokens)
    return Move(sequence, span.start, stop, span.worker, target)
