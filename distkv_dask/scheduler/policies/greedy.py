"""Greedy offloading (paper v2): blocks move from debtors to creditors wherever the performance model sees a gain.

Debtors are instances whose batch is small because long requests eat their memory; creditors have memory to spare. Room
freed at a debtor lets it decode more requests at a time; blocks held for others cost the creditor attention time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import ClassVar

from distkv_dask.placement import Move
from distkv_dask.scheduler.costs.model import Curve
from distkv_dask.scheduler.ledger.accounts import WorkerAccount
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.policies.base import Ask
from distkv_dask.scheduler.policies.overflow import Overflow

DEBTORS = 4
"""Debtors considered by one decision."""
FULL = 0.9
"""A worker that uses less than this share of its pool may become a creditor."""
SWEEP = 8
"""Numbers of blocks that are tried for a pair of debtor and creditor."""


class Greedy(Overflow):
    """Overflow, with moves of parts of debtors' longest requests that raise the sum of throughputs."""

    name: ClassVar[str] = "greedy"

    def moves(self, ledger: Ledger, waiting: Iterable[Ask]) -> list[Move]:
        """Moves of the best number of blocks of the longest request, for each of the smallest batches."""
        sample = [ask.tokens for ask in islice(waiting, 16)]
        mean = ledger.blocks(sum(sample) // len(sample)) if sample else 0
        batch = len(ledger.sequences) / max(1, ledger.decoders)
        taken: set[str] = set()
        moves = []
        for debtor in islice(ledger.room.smallest_batches(), DEBTORS):
            if not 0 < debtor.homed <= batch:
                continue
            creditor = next(self._creditors(ledger, debtor, taken), None)
            move = self._best(ledger, debtor, creditor, mean) if creditor is not None else None
            if move is not None:
                taken |= {move.source, move.target}
                moves.append(move)
        return moves

    def _creditors(self, ledger: Ledger, debtor: WorkerAccount, taken: set[str]) -> Iterator[WorkerAccount]:
        for account in islice(ledger.room.creditors(), len(taken) + 2):
            if account is not debtor and account.used < FULL * account.capacity and account.worker not in taken:
                yield account

    def _best(self, ledger: Ledger, debtor: WorkerAccount, creditor: WorkerAccount, mean: int) -> Move | None:
        """The move of a part of the debtor's longest request that gains most, if one gains."""
        sequence = max(debtor.homes, key=lambda number: ledger.sequences[number].length)
        account = ledger.sequences[sequence]
        span = account.placement[-1]
        whole = min(span.stop, account.length) // ledger.block_tokens - span.start // ledger.block_tokens
        room = min(whole, creditor.lendable)
        if account.moves or room <= 0:
            return None
        before = self._total(ledger, debtor, creditor, 0, mean)
        tries = sorted({max(1, room * part // SWEEP) for part in range(1, SWEEP + 1)})
        gains = [(self._total(ledger, debtor, creditor, blocks, mean) - before, blocks) for blocks in tries]
        gain, blocks = max(gains)
        if gain <= 0:
            return None
        stop = span.start + blocks * ledger.block_tokens
        return Move(sequence, span.start, stop, debtor.worker, creditor.worker)

    def _total(self, ledger: Ledger, debtor: WorkerAccount, creditor: WorkerAccount, blocks: int, mean: int) -> float:
        """Tokens per second of debtor and creditor together when this many blocks are moved between them."""
        more = min(blocks + debtor.free, debtor.capacity) // mean - debtor.free // mean if mean else 0
        moved, filled = blocks * ledger.block_tokens, more * mean * ledger.block_tokens
        d, c = self.model.of(debtor.worker), self.model.of(creditor.worker)
        return _rate(d, debtor.homed + more, debtor.used * ledger.block_tokens - moved + filled) + _rate(
            c, creditor.homed, creditor.used * ledger.block_tokens + moved
        )


def _rate(curve: Curve, batch: int, tokens: float) -> float:
    """Throughput of an instance: its batch over the time of a step."""
    return batch / curve.decode(batch, tokens) if batch else 0.0
