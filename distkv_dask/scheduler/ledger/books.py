"""The ledger's books: accounts of workers and sequences, and how reservations change them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from distkv_dask.placement import Endpoint, Placement
from distkv_dask.scheduler.ledger.accounts import NO_LIMIT, SequenceAccount, WorkerAccount
from distkv_dask.scheduler.ledger.debts import Debts
from distkv_dask.scheduler.ledger.indices import Room
from distkv_dask.scheduler.ledger.placements import blocks_of


class Books:
    """Accounts of all workers and sequences of one engine.

    Parameters
    ----------
    block_tokens
        Tokens in one block.
    batch
        Maximum number of sequences that one worker is home of.

    Notes
    -----
    ``epoch`` grows with every change of a placement or of the set of workers. With ``has_states`` the model keeps a
    state of each sequence at its home: idle ones take a place there, too. ``owes`` is the debt graph.
    """

    def __init__(self, block_tokens: int, batch: int = NO_LIMIT) -> None:
        self.block_tokens = block_tokens
        self.epoch = 0
        self.has_states = False
        self.workers: dict[str, WorkerAccount] = {}
        self.sequences: dict[int, SequenceAccount] = {}
        self.room = Room(batch)
        self.owes = Debts()

    @property
    def decoders(self) -> int:
        """Number of workers with weights."""
        return self.room.decoders

    def blocks(self, tokens: int) -> int:
        """Blocks that ``tokens`` tokens of one span occupy."""
        return blocks_of(tokens, self.block_tokens)

    def own_blocks(self, sequence: int) -> int:
        """Blocks that are reserved for a sequence itself."""
        return sum(self.blocks(span.tokens) for span in self.sequences[sequence].own)

    @property
    def capacity_blocks(self) -> int:
        """Blocks of all workers together."""
        return self.room.capacity

    def add_worker(
        self,
        endpoint: Endpoint,
        capacity: int,
        *,
        lend_limit: int = NO_LIMIT,
        can_decode: bool = True,
        places: int = NO_LIMIT,
    ) -> None:
        """Open an account for a worker with a pool of ``capacity`` blocks; it lends at most ``lend_limit`` of them.

        It can be home of at most ``places`` sequences.
        """
        self.epoch += 1
        account = WorkerAccount(endpoint, capacity, lend_limit, can_decode, min(places, self.room.batch))
        self.workers[account.worker] = account
        self.room.enter_worker(account)

    def retire_worker(self, worker: str, retiring: bool = True) -> None:
        """Stop (or resume) placing on a worker, because its blocks are about to be moved away."""
        self.epoch += 1
        self.workers[worker].retiring = retiring
        self.room.enter_worker(self.workers[worker])

    def holders(self, placement: Placement, length: int | None = None, *, but: str = "") -> Iterator[Endpoint]:
        """Endpoints of a placement's workers, ``but`` one; with ``length``, of those that hold tokens below it."""
        named = (s.worker for s in placement if s.tokens and (length is None or s.start < length))
        return (self.workers[worker].endpoint for worker in dict.fromkeys(named) if worker != but)

    def _count(self, sequence: int, sign: int) -> None:
        """Add a sequence's reservations to the accounts (``sign`` 1), or subtract them (-1)."""
        account = self.sequences[sequence]
        home = account.home
        wanted: Counter[str] = Counter()
        for span in account.own:
            blocks = self.blocks(span.tokens)
            wanted[span.worker] += blocks
            if span.worker != home and blocks:
                self.owes.owe(home, span.worker, sign * blocks)
                if home not in account.lost:
                    self.workers[home].borrowed += sign * blocks
        for move in account.moves:
            wanted[move.target] += self.blocks(move.tokens)
        for worker in account.workers():
            entry = self.workers[worker]
            entry.used += sign * wanted[worker]
            entry.lent += sign * wanted[worker] * (worker != home)
            if account.idle:
                entry.documents += sign * wanted[worker]
                entry.documents_lent += sign * wanted[worker] * (worker != home)
            if worker == home:
                entry.pending += sign * account.pending
                entry.due += sign * account.due
            if sign < 0:
                del entry.held[sequence]
                entry.homes.pop(sequence, None)
            else:
                entry.held[sequence] = wanted[worker]
                if worker == home and (not account.idle or (self.has_states and not account.cached)):
                    entry.homes[sequence] = None
            self.room.enter_worker(entry)
