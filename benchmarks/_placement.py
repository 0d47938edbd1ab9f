"""Placements that a benchmark sets instead of the policy; the scheduler runs in the benchmark's process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from distkv_dask.config import Config
from distkv_dask.placement import Placement, Span
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.policies import POLICIES
from distkv_dask.scheduler.policies.base import Ask, Policy


def place_by(choose: Callable[[int], Sequence[tuple[int, int | None]]]) -> None:
    """Place a sequence of n tokens in the spans of ``choose(n)``, the home's last.

    A span is (number of its worker, tokens), where None stands for all remaining tokens.
    """

    def place(policy: Policy, ledger: Ledger, ask: Ask, ahead: Ask | None = None) -> Placement:
        spans, start, names = [], 0, sorted(ledger.workers)
        for worker, room in choose(ask.tokens):
            stop = ask.tokens if room is None else start + room
            spans.append(Span(names[worker], start, stop))
            start = stop
        return tuple(spans)

    POLICIES[Config.load().policy].place = place  # type: ignore[method-assign]
