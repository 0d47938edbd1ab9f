"""Our own policy: every request on as few hosts as its size allows, work spread evenly, waiting room used by others.

What it does beyond the paper's greedy:

* Links first. A request that fits on one worker stays there, one that fits on a host stays on that host; only what is
  larger goes over the network between hosts. It rather waits than lies across a slow link for all its life.
* While it waits, the workers that it will get are kept free for it and later requests take the others: nobody
  starves, and little room is idle.
* What takes longest, prompt and answer, starts first, so that short requests fill the room between long ones and a
  batch ends without a tail of one long request on an idle cluster. Requests with a priority want latency: among them,
  short ones start first. Both are bounded by a lead in seconds, so all grow old enough to be next.
* The home is, of the workers with room, the one that would be done first, by the performance model.
* On a host, blocks are spread so that all workers keep equal room: attention to a long request is computed by all of
  them at a time, and no worker becomes a bottleneck.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import ClassVar

from distkv_dask.placement import Move, Placement, Span
from distkv_dask.scheduler.ledger.accounts import WorkerAccount
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.policies.balance import recalls, share_with_idle
from distkv_dask.scheduler.policies.base import Ask, Policy
from distkv_dask.scheduler.policies.shares import borrow_shares, overflow, placement_from_shares

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
            home = min(fitting, key=lambda account: (self._done(ledger, account, ask), account.worker))
            return (Span(home.worker, 0, ask.tokens),)
        return None if kept else self._on_hosts(ledger, ask.tokens)

    def moves(self, ledger: Ledger, waiting: Iterable[Ask]) -> list[Move]:
        """Recalls, else a share for an idle worker."""
        return recalls(ledger, waiting) or share_with_idle(ledger, self.model)

    def rank(self, ledger: Ledger, ask: Ask) -> float:
        """What takes longest first, or what takes least among those with a priority."""
        curve = self.model.curve
        pool = ledger.capacity_blocks * ledger.block_tokens // max(1, len(ledger.workers))
        step = curve.decode(1, min(ask.tokens, pool))  # what is larger than a pool is attended to by several workers
        lead = min(LEAD, curve.prefill(ask.prompt) + (ask.tokens - ask.prompt) * step)
        return Policy.rank(self, ledger, ask) + (lead if ask.priority > 0 else -lead)

    def _done(self, ledger: Ledger, account: WorkerAccount, ask: Ask) -> float:
        """Seconds until a worker would be done with what it has and one more request: its prompts, then its steps.

        It decodes for as many steps as its sequences have tokens left in the mean, and each step reads all its KV.
        """
        curve, batch = self.model.of(account.worker), account.homed + 1
        steps = (account.due + ask.tokens - ask.prompt) / batch
        tokens = account.used * ledger.block_tokens + ask.tokens
        return curve.prefill(account.pending) + steps * curve.decode(batch, tokens)

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

    def _on_hosts(self, ledger: Ledger, tokens: int) -> Placement | None:
        """Place a request on the hosts with most room; where links are slow, on no more of them than it has to be."""
        need = ledger.blocks(tokens)
        slow = self.model.exchange(self.model.between, 1) >= SLOW * self.model.curve.step
        most = _fewest(ledger, need) if slow else len(ledger.workers)
        hosts = _roomiest(ledger, need, most)
        own = ledger.room.on_host(hosts[0]) if hosts else []
        homes = [a for a in own if a.can_decode and not a.retiring and a.free and a.has_place]
        if homes:
            home = max(homes, key=lambda account: (account.free - account.lendable, account.free, account.worker))
            placement = self._spread(ledger, home, own, hosts[1:], tokens)
            if placement is not None or any(islice(ledger.room.hosts(), most, None)):
                return placement
        return overflow(ledger, tokens)  # those are all hosts: maybe with another home

    def _spread(
        self, ledger: Ledger, home: WorkerAccount, own: list[WorkerAccount], others: list[str], tokens: int
    ) -> Placement | None:
        """All workers of the home's host (``own``) down to equal room, and few workers of the other hosts."""
        need = ledger.blocks(tokens)
        far = sorted(
            (account for host in others for account in ledger.room.on_host(host)),
            key=lambda account: (others.index(account.endpoint.host), -account.lendable),
        )
        here = min(need, home.free + sum(account.lendable for account in own if account is not home))
        shares = [*borrow_shares(far, need - here), *_level(home, own, here)]
        if sum(blocks for _, blocks in shares) + home.free < need:
            return None
        return placement_from_shares(ledger, home.worker, shares, tokens)


def _roomiest(ledger: Ledger, need: int, most: int) -> list[str]:
    """Hosts with most room that together have enough, ``most`` of them at most."""
    hosts: list[str] = []
    for room, host in islice(ledger.room.hosts(), most):
        if need <= 0:
            break
        need -= room
        hosts.append(host)
    return hosts


def _fewest(ledger: Ledger, need: int) -> int:
    """How many hosts a request of ``need`` blocks would lie on if nothing but documents were there."""
    hosts = 0
    for _, host in ledger.room.hosts():
        if need <= 0:
            break
        accounts = [account for account in ledger.room.on_host(host) if not account.retiring]
        if not hosts:  # the home lends nothing: all its room is its own
            need -= max((_own(account) - _lends(account) for account in accounts if account.can_decode), default=0)
        need -= sum(_lends(account) for account in accounts)
        hosts += 1
    return hosts


def _own(account: WorkerAccount) -> int:
    """Blocks that requests at home on a worker may have, if it is empty but for documents."""
    return account.capacity - account.documents


def _lends(account: WorkerAccount) -> int:
    """Blocks that it lends then."""
    return max(0, min(_own(account), account.lend_limit - account.documents_lent))


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
