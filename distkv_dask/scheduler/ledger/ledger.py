"""The debt ledger: which worker holds how many blocks of which sequence, for whom.

It combines the paper's debt ledger (v1) and request placement map (v2), and has the running moves of blocks. Pure
bookkeeping: no clock, no I/O, no torch. One ledger belongs to one engine. The time of an event depends on the spans of
its sequences, never on the number of workers or sequences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from distkv_dask.placement import Move, Placement, Span
from distkv_dask.scheduler.ledger.accounts import NO_LIMIT, SequenceAccount
from distkv_dask.scheduler.ledger.books import Books
from distkv_dask.scheduler.ledger.objections import objection
from distkv_dask.scheduler.ledger.placements import clipped, moved


class Ledger(Books):
    """Capacity, reservations, debts and moves of all workers of one engine.

    Parameters
    ----------
    block_tokens
        Tokens in one block.
    batch
        Maximum number of sequences that one worker is home of.

    Notes
    -----
    The blocks of running ``moves`` are reserved at the target and not yet free at the source. With ``has_states`` a
    home changes only when it leaves.
    """

    def __init__(self, block_tokens: int, batch: int = NO_LIMIT) -> None:
        super().__init__(block_tokens, batch)
        self.moves: dict[Move, None] = {}

    def remove_worker(self, worker: str) -> list[int]:
        """Close a worker's account and return the sequences that lost blocks with it (still to be released).

        Moves to the worker end. Moves from it keep their reservation until they are cancelled or their sequence is
        released, since their targets may still be written to.
        """
        self.epoch += 1
        account = self.workers.pop(worker, None)
        if account is None:
            return []
        self.room.remove_worker(worker)
        for sequence in account.held:
            lost = self.sequences[sequence]
            for move in [move for move in lost.moves if move.target == worker]:
                lost.moves.remove(move)
                del self.moves[move]
            if lost.lies_on(worker):
                lost.lost.add(worker)
        return sorted(sequence for sequence in account.held if worker in self.sequences[sequence].lost)

    # Sequences

    def reserve(
        self, sequence: int, placement: Placement, prompt: int = 0, *, idle: bool = False, cached: bool = False
    ) -> None:
        """Reserve the blocks of a placement that the policy chose from this ledger, for a prompt of this length.

        Nothing will be decoded of an ``idle`` one; a ``cached`` one ended before.

        Spans of documents are shared: they take no blocks, and cannot be freed or moved before the sequence is
        released.

        Raises
        ------
        ValueError
            When a worker is unknown or has too little room, or a document's spans are not where the placement says: the
            policy saw another ledger.
        """
        wanted: Counter[str] = Counter()
        for span in placement:
            if span.document is None:
                wanted[span.worker] += self.blocks(span.tokens)
            elif span.document not in self.sequences or not self.sequences[span.document].can_share(span):
                raise ValueError(f"sequence {sequence}: {span} is not part of its document")
        for worker, blocks in wanted.items():
            account = self.workers.get(worker)
            if account is None or account.free < blocks:
                raise ValueError(f"sequence {sequence}: {blocks} blocks on {worker} do not fit the ledger")
        self.sequences[sequence] = SequenceAccount(placement, prompt, idle=idle, cached=cached)
        for document in self.sequences[sequence].documents:
            self.sequences[document].sharers.add(sequence)
        self._count(sequence, +1)

    def is_shareable(self, document: int) -> bool:
        """Whether a stored document can be shared now: complete, not moving, and not on a leaving worker."""
        account = self.sequences.get(document)
        if account is None or account.lost or account.moves:
            return False
        return not any(self.workers[worker].retiring for worker in account.workers())

    def commit(self, sequence: int, length: int) -> None:
        """Record that the KV of the first ``length`` tokens of a sequence exists."""
        account = self.sequences[sequence]
        pending, due = account.pending, account.due
        account.length = length
        if account.home not in account.lost:
            home = self.workers[account.home]
            home.pending += account.pending - pending
            home.due += account.due - due

    def make_document(self, sequence: int, tokens: int) -> list[Span]:
        """Make a document of a sequence's first ``tokens`` tokens, whole blocks; returns the spans of the freed room.

        Raises
        ------
        ValueError
            When the sequence would have no blocks, or its blocks are being moved or shared.
        """
        account = self.sequences[sequence]
        if account.moves or account.sharers or not 0 < tokens <= account.length or tokens % self.block_tokens:
            raise ValueError(f"sequence {sequence}: {tokens} tokens of {account} cannot be kept")
        before = account.documents
        self._count(sequence, -1)
        rest = list(clipped(account.own, tokens, account.stop))
        account.placement = tuple(clipped(account.placement, 0, tokens))
        account.length, account.prompt, account.idle = tokens, tokens, True
        self._count(sequence, +1)
        for document in before - account.documents:
            self.sequences[document].sharers.discard(sequence)
        return [span for span in rest if span.worker not in account.lost]

    def split(self, sequence: int, document: int, tokens: int) -> None:
        """Make a document of a live sequence's first ``tokens`` tokens, whole blocks, which it shares from now on.

        Raises
        ------
        ValueError
            When they are not computed, or no room of its own would be left, or blocks of it are moving or lost.
        """
        account = self.sequences[sequence]
        own = tuple(clipped(account.own, 0, tokens))
        is_settled = own and not (account.moves or account.lost or account.sharers)
        if not is_settled or tokens % self.block_tokens or not 0 < tokens <= account.length or tokens == account.stop:
            raise ValueError(f"sequence {sequence}: {tokens} tokens of {account} cannot be shared")
        self.epoch += 1
        self._count(sequence, -1)
        before = tuple(span for span in account.placement if span.document is not None)
        rest = clipped(account.own, tokens, account.stop)
        self.sequences[document] = SequenceAccount((*before, *own), tokens, tokens, idle=True, cached=True)
        account.placement = (*before, *(replace(span, document=document) for span in own), *rest)
        for shared in self.sequences[document].documents:
            self.sequences[shared].sharers.add(document)
        self.sequences[document].sharers.add(sequence)
        self._count(document, +1)
        self._count(sequence, +1)

    def replace_lost(self, sequence: int, placement: Placement) -> None:
        """Replace the lost spans of a sequence as the policy chose from this ledger; the others are unchanged.

        Raises
        ------
        ValueError
            When others share its blocks, or blocks of it are being moved.
        """
        account = self.sequences[sequence]
        if account.moves or account.sharers:
            raise ValueError(f"sequence {sequence}: {account} cannot be repaired")
        self.epoch += 1
        self._count(sequence, -1)
        account.placement, account.lost = placement, set()
        self._count(sequence, +1)

    def lay(self, sequence: int, placement: Placement) -> None:
        """Give a sequence other room for tokens that were not computed.

        Raises
        ------
        ValueError
            When there is no such room, or blocks of it are moving, lost or shared by others.
        """
        account = self.sequences[sequence]
        if account.moves or account.lost or account.sharers:
            raise ValueError(f"sequence {sequence}: {account} cannot be placed elsewhere now")
        self.epoch += 1
        before, account.placement = account.placement, placement
        self._recount(sequence, before)
        if any(self.workers[span.worker].free < 0 for span in placement):
            account.placement = before
            self._recount(sequence, placement)
            raise ValueError(f"sequence {sequence}: no room for it at {placement}")

    def _recount(self, sequence: int, before: Placement) -> None:
        """Count a placement instead of the one before."""
        account = self.sequences[sequence]
        now, account.placement = account.placement, before
        self._count(sequence, -1)
        account.placement = now
        self._count(sequence, +1)

    def resize(self, sequence: int, own: Iterable[Span]) -> None:
        """Extend or shorten the own spans of a stored document; no sequence shares the removed ones.

        Raises
        ------
        ValueError
            When there is no room for more.
        """
        account = self.sequences[sequence]
        before = account.placement
        self._count(sequence, -1)
        account.placement = (*(span for span in before if span.document is not None), *own)
        account.length = account.prompt = account.stop
        self._count(sequence, +1)
        if any(self.workers[worker].free < 0 for worker in account.workers()):
            self.resize(sequence, (span for span in before if span.document is None))
            raise ValueError(f"sequence {sequence}: no room for more of it")

    def release_sequence(self, sequence: int) -> list[str]:
        """End all of a sequence's debts and moves, and return the live workers that have blocks of it.

        Raises
        ------
        ValueError
            When others share its blocks.
        """
        account = self.sequences[sequence]
        if account.sharers:
            raise ValueError(f"sequence {sequence}: its blocks are shared by {sorted(account.sharers)}")
        for document in account.documents:
            self.sequences[document].sharers.discard(sequence)
        workers = list(account.workers())
        self._count(sequence, -1)
        for move in account.moves:
            del self.moves[move]
        del self.sequences[sequence]
        return workers

    # Moves

    def objection(self, move: Move) -> str:
        """Why a move cannot start now; empty when it can."""
        account, target = self.sequences.get(move.sequence), self.workers.get(move.target)
        if account is None or target is None or move.source not in self.workers:
            return "the sequence or a worker is gone"
        if self.has_states and move.stop == account.stop:
            if not self.workers[move.source].retiring:
                return "the tail goes with its home, which has the sequence's state"
            if not target.has_place:
                return "the tail goes with its home, and the target has no place for one more sequence"
        return objection(move, account, target, self.block_tokens)

    def start_move(self, move: Move) -> None:
        """Reserve a move's blocks at its target.

        Moves are served in order: blocks reserved by one are not available to later ones.

        Raises
        ------
        ValueError
            When the move cannot start; the message is :meth:`objection`'s.
        """
        objection = self.objection(move)
        if objection:
            raise ValueError(f"{move}: {objection}")
        self._count(move.sequence, -1)
        self.sequences[move.sequence].moves.append(move)
        self._count(move.sequence, +1)
        self.moves[move] = None

    def finish_move(self, move: Move) -> Placement:
        """The target has the blocks: switch the placement, free the source's blocks, and return the new placement.

        Raises
        ------
        ValueError
            When the move is not, or no longer, under way, or its source died.
        """
        account = self._under_way(move)
        if move.source in account.lost:
            raise ValueError(f"{move}: the source is gone")
        self.epoch += 1
        self._count(move.sequence, -1)
        account.moves.remove(move)
        account.placement = moved(account.placement, move, self.block_tokens)
        self._count(move.sequence, +1)
        del self.moves[move]
        return account.placement

    def cancel_move(self, move: Move) -> None:
        """Release a move's reservation; the placement is unchanged (no error if the move has ended)."""
        if move in self.moves:
            self._count(move.sequence, -1)
            self.sequences[move.sequence].moves.remove(move)
            self._count(move.sequence, +1)
            del self.moves[move]

    def _under_way(self, move: Move) -> SequenceAccount:
        if move not in self.moves:
            raise ValueError(f"{move} is not under way")
        return self.sequences[move.sequence]
