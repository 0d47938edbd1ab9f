"""DGFM (paper v1): borrowing, and cycles in the debt graph are cancelled by recalling blocks.

An instance that lends and borrows at once wastes its links: in a cycle of debts, each member recalls as many blocks as
the smallest debt of the cycle.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar

from distkv_dask.placement import Move
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.policies.base import Ask
from distkv_dask.scheduler.policies.overflow import Overflow


class Dgfm(Overflow):
    """Overflow, with recalls that make the debt graph acyclic."""

    name: ClassVar[str] = "dgfm"

    def moves(self, ledger: Ledger, waiting: Iterable[Ask]) -> list[Move]:
        """Recall blocks along one cycle of debts as far as they fit: the recalls of others make room for the rest."""
        cycle = find_cycle(ledger)
        if not cycle:
            return []
        debts = [(debtor, cycle[(at + 1) % len(cycle)]) for at, debtor in enumerate(cycle)]
        smallest = min(ledger.owes[debtor][creditor] for debtor, creditor in debts)
        return [
            move
            for debtor, creditor in debts
            for move in recalls(ledger, debtor, creditor, min(smallest, ledger.workers[debtor].free))
        ]


def find_cycle(ledger: Ledger) -> list[str]:
    """Workers of one cycle of debts, each owing to the next and the last to the first; empty if there is none."""
    done: set[str] = set()
    for start in ledger.owes:
        path: dict[str, Iterator[str]] = {}
        node: str | None = start
        while node is not None and node not in done:
            path[node] = iter(_debtors_among(ledger, node))
            node = None
            while path and node is None:
                last = next(reversed(path))
                node = next((other for other in path[last] if other not in done), None)
                if node is None:
                    done.add(last)
                    del path[last]
            if node in path:
                names = list(path)
                return names[names.index(node) :]
    return []


def _debtors_among(ledger: Ledger, debtor: str) -> list[str]:
    """Live creditors of a worker that owe something themselves: only they can be on a cycle."""
    if debtor not in ledger.workers:
        return []
    return [other for other in ledger.owes[debtor] if other in ledger.owes and other in ledger.workers]


def recalls(ledger: Ledger, debtor: str, creditor: str, blocks: int) -> Iterator[Move]:
    """Moves of up to ``blocks`` blocks of the debtor's sequences from a creditor back home."""
    for sequence in ledger.workers[debtor].homes:
        account = ledger.sequences[sequence]
        for span in account.placement:
            if blocks <= 0:
                return
            if span.worker == creditor and span.document is None and not account.moves:
                share = min(blocks, ledger.blocks(span.tokens))
                stop = min(span.stop, span.start + share * ledger.block_tokens)
                blocks -= share
                yield Move(sequence, span.start, stop, creditor, debtor)
