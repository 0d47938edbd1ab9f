"""Invariants of a ledger, checked by recounting everything: tests do so after every event."""

from __future__ import annotations

from collections import Counter

from distkv_dask.scheduler.ledger.ledger import Ledger


def check_ledger(ledger: Ledger) -> None:
    """Assert a ledger's invariants.

    Spans are gapless and end on whole blocks where they are joined, blocks are conserved, shared ones counted once,
    no worker is above its capacity, debts are the spans away from home.
    """
    held: dict[str, Counter[int]] = {worker: Counter() for worker in ledger.workers}
    owed: Counter[tuple[str, str]] = Counter()
    borrowed: Counter[str] = Counter()
    for number, account in ledger.sequences.items():
        end = 0
        for span in account.placement:
            assert span.start == end <= span.stop, account
            end = span.stop
            blocks = ledger.blocks(span.tokens) * (span.document is None)
            if span.document is not None:
                document = ledger.sequences[span.document]
                assert number in document.sharers, (number, span)
                assert span.start % ledger.block_tokens == span.stop % ledger.block_tokens == 0, span
                assert any(s.worker == span.worker and s.start <= span.start < span.stop <= s.stop
                           for s in document.own), (number, span, document)  # fmt: skip
            if span.worker not in account.lost:
                held[span.worker][number] += blocks
            if span.worker != account.home:
                owed[account.home, span.worker] += blocks
                borrowed[account.home] += blocks * (account.home not in account.lost)
        assert 0 <= account.length <= end, account
        assert all(number in ledger.sequences[other].documents for other in account.sharers), account
        for move in account.moves:
            assert move in ledger.moves, move
            held[move.target][number] += ledger.blocks(move.tokens)
    assert len(ledger.moves) == sum(len(account.moves) for account in ledger.sequences.values())
    assert ledger.owes.by_pair() == +owed, (ledger.owes, owed)
    _check_workers(ledger, held)
    for worker, entry in ledger.workers.items():
        assert entry.borrowed == borrowed[worker], (worker, entry)
    ledger.room.check(ledger.workers)


def _check_workers(ledger: Ledger, held: dict[str, Counter[int]]) -> None:
    """Assert what workers' accounts say of the blocks that they hold of each sequence."""
    for worker, entry in ledger.workers.items():
        homes = {n for n in held[worker] if ledger.sequences[n].home == worker}
        guests = {n: blocks for n, blocks in held[worker].items() if n not in homes}
        assert entry.held == held[worker], (worker, entry)
        placed = {
            n for n in homes if not ledger.sequences[n].idle or (ledger.has_states and not ledger.sequences[n].cached)
        }
        assert entry.homes.keys() == placed, (worker, entry)
        assert entry.used == sum(held[worker].values()) <= entry.capacity - entry.cached, (worker, entry)
        assert entry.cached >= 0, (worker, entry)
        assert entry.lent == sum(guests.values()), (worker, entry)
        assert entry.documents == sum(held[worker][n] for n in held[worker] if ledger.sequences[n].idle), entry
        assert entry.documents_lent == sum(guests[n] for n in guests if ledger.sequences[n].idle), entry
        assert entry.pending == sum(ledger.sequences[n].pending for n in homes), (worker, entry)
        assert entry.due == sum(ledger.sequences[n].due for n in homes), (worker, entry)
