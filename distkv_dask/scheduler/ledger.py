"""The debt ledger: which worker holds how many blocks of which sequence, for whom.

The facts of the paper's debt ledger (v1) and request placement map (v2). Pure bookkeeping: no clock, no input or
output, no torch. One ledger belongs to one engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from distkv_dask.types import Endpoint, Placement


@dataclass(slots=True)
class WorkerAccount:
    """One worker's pool: ``capacity`` and ``used`` in blocks, and how many sequences call it home."""

    endpoint: Endpoint
    capacity: int
    used: int = 0
    homed: int = 0

    @property
    def free(self) -> int:
        """Blocks that nobody has reserved."""
        return self.capacity - self.used


@dataclass(slots=True)
class SequenceAccount:
    """One live sequence: where its blocks are reserved, and how many tokens' KV is committed (``length``)."""

    placement: Placement
    length: int = 0

    @property
    def home(self) -> str:
        """The worker that decodes the sequence: the one that holds its tail."""
        return self.placement[-1].worker

    def lies_on(self, worker: str) -> bool:
        """Whether the worker holds a span of the sequence."""
        return any(span.worker == worker for span in self.placement)


class Ledger:
    """Capacity, reservations and debts of all workers of one engine.

    Parameters
    ----------
    block_tokens
        Tokens in one block.

    Notes
    -----
    ``epoch`` grows with every change of a placement or of the set of workers.
    """

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.epoch = 0
        self.workers: dict[str, WorkerAccount] = {}
        self.sequences: dict[int, SequenceAccount] = {}

    def blocks(self, tokens: int) -> int:
        """Blocks that ``tokens`` tokens of one span occupy."""
        return -(-tokens // self.block_tokens)

    @property
    def capacity_blocks(self) -> int:
        """Blocks of all workers together."""
        return sum(account.capacity for account in self.workers.values())

    def add_worker(self, endpoint: Endpoint, capacity: int) -> None:
        """Open an account for a worker whose pool has ``capacity`` blocks."""
        self.epoch += 1
        self.workers[endpoint.worker] = WorkerAccount(endpoint, capacity)

    def remove_worker(self, worker: str) -> list[int]:
        """Close a worker's account and return the sequences that lost blocks by it (still to be released)."""
        self.epoch += 1
        self.workers.pop(worker, None)
        return [number for number, account in self.sequences.items() if account.lies_on(worker)]

    def reserve(self, sequence: int, placement: Placement) -> None:
        """Reserve the blocks of a placement that the policy chose from this very ledger.

        Raises
        ------
        ValueError
            When a worker is unknown or has too little room: the policy saw another ledger.
        """
        for span in placement:
            account = self.workers.get(span.worker)
            if account is None or account.free < self.blocks(span.tokens):
                raise ValueError(f"sequence {sequence}: {span} does not fit the ledger")
        for span in placement:
            self.workers[span.worker].used += self.blocks(span.tokens)
        self.sequences[sequence] = SequenceAccount(placement)
        self.workers[self.sequences[sequence].home].homed += 1

    def commit(self, sequence: int, length: int) -> None:
        """Record that the KV of the first ``length`` tokens of a sequence exists."""
        self.sequences[sequence].length = length

    def release(self, sequence: int) -> Placement:
        """Settle all of a sequence's debts and return where its blocks were."""
        account = self.sequences.pop(sequence)
        for span in account.placement:
            if span.worker in self.workers:
                self.workers[span.worker].used -= self.blocks(span.tokens)
        if account.home in self.workers:
            self.workers[account.home].homed -= 1
        return account.placement

    def debts(self) -> Counter[tuple[str, str]]:
        """Blocks owed, by (debtor, creditor): the debtor is a sequence's home, the creditor holds blocks for it."""
        owed: Counter[tuple[str, str]] = Counter()
        for account in self.sequences.values():
            for span in account.placement:
                if span.worker != account.home:
                    owed[account.home, span.worker] += self.blocks(span.tokens)
        return owed

    def lent(self) -> Counter[str]:
        """Blocks that each creditor holds for others."""
        total: Counter[str] = Counter()
        for (_, creditor), blocks in self.debts().items():
            total[creditor] += blocks
        return total

    def holders(self, placement: Placement, length: int | None = None, *, but: str = "") -> Iterator[Endpoint]:
        """Endpoints of a placement's workers, ``but`` one; with ``length``, of those whose span begins below it."""
        for span in placement:
            if span.worker != but and span.tokens and (length is None or span.start < length):
                yield self.workers[span.worker].endpoint

    def check(self) -> None:
        """Assert the ledger's invariants: spans are gapless, blocks conserved, no worker above its capacity."""
        used: Counter[str] = Counter()
        for account in self.sequences.values():
            end = 0
            for span in account.placement:
                assert span.start == end <= span.stop, account
                end = span.stop
                used[span.worker] += self.blocks(span.tokens)
            assert 0 <= account.length <= end, account
        for worker, entry in self.workers.items():
            assert entry.used == used[worker] <= entry.capacity, (worker, entry, used)
