"""Placements and moves that a test sets instead of the policy."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest

from distkv_dask.config import Config
from distkv_dask.placement import Move, Placement, Span
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.policies import POLICIES
from distkv_dask.scheduler.policies.base import Ask, Policy
from distkv_dask.scheduler.policies.overflow import Overflow


def force_split(split: Sequence[tuple[int, int | None]], monkeypatch: pytest.MonkeyPatch) -> int:
    """Place every sequence in spans (worker, tokens), where None is the rest; returns the number of workers needed."""

    def place(policy: Policy, ledger: Ledger, ask: Ask, ahead: Ask | None = None) -> Placement:
        spans, start, names = [], 0, sorted(ledger.workers)
        for worker, length in split:
            stop = ask.tokens if length is None else start + length
            spans.append(Span(names[worker], start, stop))
            start = stop
        return tuple(spans)

    monkeypatch.setattr(POLICIES[Config.load().policy], "place", place)
    return max(worker for worker, _ in split) + 1


def move_at_random(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Have the policy propose random moves of random blocks between random workers whenever it is called."""
    rng = random.Random(seed)

    def moves(policy: Policy, ledger: Ledger, waiting: object) -> list[Move]:
        return list(propose(ledger))

    def propose(ledger: Ledger) -> Iterator[Move]:
        for sequence, account in ledger.sequences.items():
            span = rng.choice(account.placement)
            blocks = (min(span.stop, account.length) - span.start) // ledger.block_tokens
            if blocks > 0:
                first = rng.randrange(blocks)
                last = rng.randint(first + 1, blocks)
                start, stop = (span.start + at * ledger.block_tokens for at in (first, last))
                yield Move(sequence, start, stop, span.worker, rng.choice(sorted(ledger.workers)))

    monkeypatch.setattr(Overflow, "moves", moves)
