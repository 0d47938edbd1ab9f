"""Our own policy: every request on as few hosts as its size allows, work spread evenly, waiting room used by others.

What it does beyond the paper's greedy:

* Links first. A request that fits on one worker stays there, one that fits on a host stays on that host; only what is
  larger goes over the network between hosts. It rather waits than lies across a slow link for all its life.
* While it waits, the workers that it will get are kept free for it and later requests take the others: nobody
  starves, and little room is idle.
* Long prompts start first, so that short ones fill the room between them and a batch ends without a tail of one long
  request on an idle cluster. Requests with a priority want latency: among them, short ones start first. Both are
  bounded by a lead in seconds, so all grow old enough to be next.
* The home is, of the workers with room, the one with least work before it, by the performance model.
* On a host, blocks are spread so that all workers keep equal room: attention to a long request is computed by all of
  them at a time, and no worker becomes a bottleneck.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import ClassVar

from distkv_dask.scheduler.accounts import WorkerAccount
from distkv_dask.scheduler.ledger import Ledger
from distkv_dask.scheduler.policies.balancing import recalls, share_with_idle
from distkv_dask.scheduler.policies.base import Ask, Policy
from distkv_dask.scheduler.policies.laying import borrow, lay, overflow
from distkv_dask.types import Move, Placement, Span

CANDIDATES = 16
"""Workers among which a home is chosen: those with most room."""
LEAD = 600.0
"""Seconds by which one request may overtake another, at most, for the work that it brings."""
SLOW = 0.25
"""Hosts are far apart when the exchange for one sequence takes this share of a step without sequences."""


class Best(Policy):
    """Few hosts, even work, waiting room used by others."""

    name: ClassVar[str] = "best"
    look_ahead: ClassVar[int] = 64

    def place(self, ledger: Ledger, ask: Ask, ahead: Ask | None = None) -> Placement | None:
        """Place a request on one worker, or one host, or as few hosts as can hold it."""
        need = ledger.blocks(ask.tokens)
        kept = self._kept(ledger, ledger.blocks(ahead.tokens)) if ahead else frozenset()
        homes = (account for account in ledger.room.homes() if account.worker not in kept)
        fitting = [account for account in islice(homes, CANDIDATES) if account.free >= need]
        if fitting:
            home = min(fitting, key=self._work)
            return (Span(home.worker, 0, ask.tokens),)
        if kept:
            return None
        first = next((host for _, host in ledger.room.hosts()), None)
        on_one = first is not None and need <= _potential(ledger, first)
        placement = self._spread(ledger, self._hosts(ledger, need, on_one), ask.tokens)
        return placement or (None if on_one else overflow(ledger, ask.tokens))

    def moves(self, ledger: Ledger, waiting: Iterable[Ask]) -> list[Move]:
        """Recalls, else a share for an idle worker."""
        return recalls(ledger, waiting) or share_with_idle(ledger, self.model)

    def rank(self, ask: Ask) -> float:
        """Longest prefill first, or shortest first among those with a priority."""
        lead = min(LEAD, self.model.curve.prefill(ask.prompt))
        return super().rank(ask) + (lead if ask.priority > 0 else -lead)

    def _work(self, account: WorkerAccount) -> tuple[float, int, str]:
        """Seconds of prefill that a new request would wait for, then sequences with which it would share steps."""
        return self.model.of(account.worker).prefill(account.pending), account.homed, account.worker

    def _kept(self, ledger: Ledger, need: int) -> frozenset[str]:
        """Workers that are kept free for a request that waits: the roomiest of those that could serve it."""
        roomiest = next(ledger.room.homes(), None)
        if roomiest is not None and need <= roomiest.capacity:
            return frozenset([roomiest.worker])
        kept: list[str] = []
        for _, host in ledger.room.hosts():
            if need <= 0:
                break
            accounts = ledger.room.on_host(host)
            need -= sum(account.capacity for account in accounts)
            kept += [account.worker for account in accounts]
        return frozenset(kept)

    def _hosts(self, ledger: Ledger, need: int, on_one: bool) -> list[str]:
        """Hosts with most room that together have enough; one, where that can do (``on_one``) and links are slow."""
        near = self.model.exchange(self.model.between, 1) < SLOW * self.model.curve.step
        hosts: list[str] = []
        left = need
        for room, host in ledger.room.hosts():
            if left <= 0 or (hosts and on_one and not near):
                break
            left -= room
            hosts.append(host)
        return hosts

    def _spread(self, ledger: Ledger, hosts: list[str], tokens: int) -> Placement | None:
        """All workers of the first host down to equal room, and as few workers of the other hosts as possible."""
        need = ledger.blocks(tokens)
        own = ledger.room.on_host(hosts[0]) if hosts else []
        homes = [a for a in own if a.can_decode and not a.retiring and a.free and a.homed < ledger.room.batch]
        if not homes:
            return None
        home = max(homes, key=lambda account: (account.free - account.lendable, account.free, account.worker))
        far = sorted(
            (account for host in hosts[1:] for account in ledger.room.on_host(host)),
            key=lambda account: (hosts.index(account.endpoint.host), -account.lendable),
        )
        here = min(need, home.free + sum(account.lendable for account in own if account is not home))
        shares = [*borrow(far, need - here), *_level(home, own, here)]
        return lay(ledger, home.worker, shares, tokens) if sum(n for _, n in shares) + home.free >= need else None


def _potential(ledger: Ledger, host: str) -> int:
    """Blocks of the largest request that would fit on a host if it were empty."""
    accounts = ledger.room.on_host(host)
    own = max((account.capacity - account.lends for account in accounts if account.can_decode), default=None)
    return 0 if own is None else own + sum(account.lends for account in accounts)


def _level(home: WorkerAccount, own: list[WorkerAccount], blocks: int) -> Iterator[tuple[str, int]]:
    """Shares of a host's other workers that leave all, and the home, equally much room; the home gets at least one."""
    rooms = sorted([(account.lendable, account.worker) for account in own if account is not home])
    left, size = blocks, len(rooms) + 1
    total = home.free + sum(room for room, _ in rooms)
    level = (total - blocks) / size  # a worker with less room than this gives nothing, so the others go lower
    for room, worker in rooms:
        share = min(room, left - 1, max(0, round(room - level)))
        total -= room
        size -= 1
        left -= share
        level = (total - left) / size
        yield worker, share
