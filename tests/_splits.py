"""Placements that a test asks for, instead of the policy's."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from distkv_dask.config import Config
from distkv_dask.placement import Placement, Span
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.policies import POLICIES
from distkv_dask.scheduler.policies.base import Ask, Policy


def force_split(split: Sequence[tuple[int, int | None]], monkeypatch: pytest.MonkeyPatch) -> int:
    """Place every sequence in spans of (worker, room; None is the rest); the number of workers that it takes."""

    def place(policy: Policy, ledger: Ledger, ask: Ask, ahead: Ask | None = None) -> Placement:
        spans, start, names = [], 0, sorted(ledger.workers)
        for worker, length in split:
            stop = ask.tokens if length is None else start + length
            spans.append(Span(names[worker], start, stop))
            start = stop
        return tuple(spans)

    monkeypatch.setattr(POLICIES[Config.load().policy], "place", place)
    return max(worker for worker, _ in split) + 1
