"""The dashboard's view of one engine at one moment, limited to a readable size. Pure.

A view has at most :data:`WORKERS` bars and :data:`SEQUENCES` rows, and counts the rest. It is made from running totals,
so that it costs the scheduler little.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, field
from typing import NamedTuple

from distkv_dask.scheduler.engines.figures import Event, Figures, Sample
from distkv_dask.scheduler.ledger.accounts import WorkerAccount
from distkv_dask.scheduler.lifecycle.stalls import aside
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.request import Request
from distkv_dask.scheduler.records.states import ASIDE, UNDER_WAY

WORKERS = 40
"""Number of workers shown individually: those with the most blocks in use."""

SEQUENCES = 30
"""Number of sequences shown individually: those with the most placed tokens."""

LINKS = 20
"""Number of measured links shown: the slowest ones."""

STATES = (*(state.label for state in UNDER_WAY), ASIDE)
"""States of live requests."""


@dataclass(frozen=True, slots=True)
class WorkerBar:
    """One worker's pool in blocks, or several workers' together; all parts up to free make up the capacity.

    Of the cached ones, ``copies`` are copies of other workers' blocks; ``on_disk`` are those on the worker's disk.
    """

    label: str
    role: str
    own: int
    lent: int
    documents: int
    cached: int
    free: int
    borrowed: int
    homes: int
    copies: int
    on_disk: int


SUMS = ("own", "lent", "documents", "cached", "free", "borrowed", "homes", "copies", "on_disk")


@dataclass(frozen=True, slots=True)
class SequenceRow:
    """One sequence: tokens of its prompt, generated so far, with KV stored; and where: (worker's label, tokens)."""

    number: int
    state: str
    prompt: int
    generated: int
    stored: int
    home: str
    rate: float
    strip: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class AnatomyRow:
    """Milliseconds of an average decode step of a home: computing, sending, waiting for partials, between windows."""

    label: str
    compute: float
    sending: float
    waiting: float
    gap: float


class LinkRow(NamedTuple):
    """A measured link of two workers or hosts: seconds one way, and bytes per second."""

    one: str
    other: str
    latency: float
    bandwidth: float


@dataclass(frozen=True, slots=True)
class View:
    """One engine at one moment; times are seconds, memory is blocks of ``block_bytes`` bytes."""

    time: float
    engine: str
    model: str
    block_bytes: int
    block_tokens: int
    epoch: int
    states: Mapping[str, int] = field(default_factory=dict)
    workers: tuple[WorkerBar, ...] = ()
    more_workers: int = 0
    debts: tuple[tuple[str, str, int], ...] = ()
    sequences: tuple[SequenceRow, ...] = ()
    more_sequences: int = 0
    anatomy: tuple[AnatomyRow, ...] = ()
    links: tuple[LinkRow, ...] = ()
    latencies: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    history: tuple[Sample, ...] = ()
    events: tuple[Event, ...] = ()
    finished: Mapping[str, int] = field(default_factory=dict)


def view_of(life: MachineState, figures: Figures, model: str, label: Callable[[str], str], now: float) -> View:
    """Make a view of an engine.

    Parameters
    ----------
    life, figures
        The engine's.
    model
        The model's name, for display.
    label
        Gives a short name for a worker's address.
    now
        The gManager's clock.
    """
    ledger = life.ledger
    accounts = heapq.nlargest(WORKERS, ledger.workers.values(), key=lambda one: (one.used, one.worker))
    shown = {account.worker for account in accounts}
    bars = sorted((_bar(life, account, label) for account in accounts), key=lambda bar: bar.label)
    others = [account for account in ledger.workers.values() if account.worker not in shown]
    if others:
        bars.append(_together(life, others))
    placed = ((one.stop, number) for number, one in ledger.sequences.items() if not life.requests[number].is_cached)
    largest = [life.requests[number] for _, number in heapq.nlargest(SEQUENCES, placed)]
    states = states_of(life)
    debts = heapq.nlargest(WORKERS, ledger.owes.by_pair().items(), key=lambda item: item[1])
    return View(
        time=now,
        engine=life.engine,
        model=model,
        block_bytes=life.block_bytes,
        block_tokens=ledger.block_tokens,
        epoch=ledger.epoch,
        states=states,
        workers=tuple(bars),
        more_workers=len(others),
        debts=tuple((label(debtor), label(creditor), blocks) for (debtor, creditor), blocks in debts),
        sequences=tuple(_row(life, live, label, now) for live in sorted(largest, key=lambda live: live.sequence)),
        more_sequences=states.total() - len(largest),
        anatomy=_anatomy(figures, shown, label),
        links=_links(life, label),
        latencies={
            "in the queue": figures.queue.percentiles(),
            "to the first token": figures.first_token.percentiles(),
            "for each further token": figures.per_token.percentiles(),
        },
        history=tuple(figures.history),
        events=tuple(figures.events),
        finished={str(reason): number for reason, number in figures.finished.items()},
    )


def states_of(life: MachineState) -> Counter[str]:
    """Number of live requests by state."""
    return Counter(
        ASIDE if aside(life, live) else live.state.label for live in life.requests.values() if not live.is_cached
    )


def _bar(life: MachineState, account: WorkerAccount, label: Callable[[str], str]) -> WorkerBar:
    return WorkerBar(
        label=label(account.worker),
        role="instance" if account.can_decode else "memory",
        **account.parts(),
        borrowed=account.borrowed,
        homes=account.homed,
        copies=life.extents.blocks[account.worker, "workers"],
        on_disk=life.extents.on_disk(account.worker),
    )


def _together(life: MachineState, accounts: list[WorkerAccount]) -> WorkerBar:
    bars = [_bar(life, account, str) for account in accounts]
    total = {name: sum(getattr(bar, name) for bar in bars) for name in SUMS}
    return WorkerBar(label=f"{len(bars)} others", role="", **total)


def _row(life: MachineState, live: Request, label: Callable[[str], str], now: float) -> SequenceRow:
    account = life.ledger.sequences[live.sequence]
    strip = tuple((label(span.worker), span.filled(account.length)) for span in account.placement)
    seconds = live.timings(now).decode
    return SequenceRow(
        number=live.sequence,
        state=live.state.label,
        prompt=len(live.prompt),
        generated=len(live.generated),
        stored=account.length,
        home=label(account.home),
        rate=(len(live.generated) - 1) / seconds if seconds > 0 and live.generated else 0.0,
        strip=strip,
    )


def _anatomy(figures: Figures, shown: set[str], label: Callable[[str], str]) -> tuple[AnatomyRow, ...]:
    rows = []
    for worker, one in figures.anatomy.items():
        if worker in shown and one.steps:
            scale = 1000 / one.steps
            parts = max(0.0, one.seconds - one.sending - one.waiting), one.sending, one.waiting, one.gap
            rows.append(AnatomyRow(label(worker), *(part * scale for part in parts)))
    return tuple(sorted(rows, key=lambda row: row.label))


def _links(life: MachineState, label: Callable[[str], str]) -> tuple[LinkRow, ...]:
    """The slowest links first."""
    slowest = heapq.nlargest(LINKS, life.policy.model.links.items(), key=lambda item: (item[1].latency, item[0]))
    return tuple(LinkRow(label(one), label(other), *astuple(link)) for (one, other), link in slowest)
