"""Our own policy: each request on as few hosts as possible, work spread evenly, room of waiting requests used.

Beyond the paper's greedy:

* Links first. A request that fits on one worker stays there, one that fits on a host stays on that host; only larger
ones use the network between hosts. A request waits rather than use a slow link in every step. * While it waits, its
future workers are kept free for it and later requests use the others: no request starves, and little room is idle. *
The request that takes longest (prompt and answer) starts first, so that short requests fill the room between long ones
and a batch does not end with one long request on an idle cluster. Requests with a priority want latency: among them,
short ones start first. Both are bounded by a lead in seconds, so no request waits forever.
* The home is the worker with room that would finish first, by the performance model.
* On a host, blocks are spread so that all workers keep equal room: all of them compute attention over a long request in
parallel, and none becomes a bottleneck.
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
"""Number of candidates for a home: the workers with the most room."""
LEAD = 600.0
"""Maximum seconds by which one request may overtake another because of its work."""
SLOW = 0.25
"""Hosts are far apart when the exchange for one sequence takes this share of a step without sequences."""


class Best(Policy):
    """Few hosts, even work, room of waiting requests used by others."""

    name: ClassVar[str] = "best"
    look_ahead: ClassVar[int] = 64

    def place(self, ledger: Ledger, ask: Ask, ahead: Ask | None = None) -> Placement | None:
        """Place a request on one worker, or one host, or as few hosts as possible."""
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
        """The longest requests first, or the shortest among those with a priority."""
        curve = self.model.curve
        pool = ledger.capacity_blocks * ledger.block_tokens // max(1, len(ledger.workers))
        step = curve.decode(1, min(ask.tokens, pool))  # several workers attend to what is larger than a pool
        lead = min(LEAD, curve.prefill(ask.prompt) + (ask.tokens - ask.prompt) * step)
        return Policy.rank(self, ledger, ask) + (lead if ask.priority > 0 else -lead)

    def _done(self, ledger: Ledger, account: WorkerAccount, ask: Ask) -> float:
        """Seconds until a worker would finish its requests and one more: prompts, then steps.

        It decodes for as many steps as its sequences have tokens left on average, and each step reads all its KV.
        """
        curve, batch = self.model.of(account.worker), account.homed + 1
        steps = (account.due + ask.tokens - ask.prompt) / batch
        tokens = account.used * ledger.block_tokens + ask.tokens
        return curve.prefill(account.pending) + steps * curve.decode(batch, tokens)

    def _kept(self, ledger: Ledger, need: int) -> frozenset[str]:
        """Workers that are kept free for a waiting request: those with the most room that could serve it."""
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
        """Place a request on the hosts with the most room; if links are slow, on as few as possible."""
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
        return overflow(ledger, tokens)  # these are all hosts: perhaps with another home

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
    """The hosts with the most room that together have enough, at most ``most`` of them."""
    hosts: list[str] = []
    for room, host in islice(ledger.room.hosts(), most):
        if need <= 0:
            break
        need -= room
        hosts.append(host)
    return hosts


def _fewest(ledger: Ledger, need: int) -> int:
    """Number of hosts for a request of ``need`` blocks on a cluster with only documents."""
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
    """Blocks for own requests of a worker that has only documents."""
    return account.capacity - account.documents


def _lends(account: WorkerAccount) -> int:
    """Blocks that such a worker lends."""
    return max(0, min(_own(account), account.lend_limit - account.documents_lent))


def _level(home: WorkerAccount, own: list[WorkerAccount], blocks: int) -> Iterator[tuple[str, int]]:
    """Shares of a host's other workers that leave all, and the home, equal room; the home gets at least one block."""
    rooms = sorted([(account.lendable, account.worker) for account in own if account is not home])
    left, size = blocks, len(rooms) + 1
    total = home.free + sum(room for room, _ in rooms)
    level = (total - blocks) / size  # a worker with less room than this gives nothing, so the others give more
    for room, worker in rooms:
        share = min(room, left - 1, max(0, round(room - level)))
        total -= room
        size -= 1
        left -= share
        level = (total - left) / size
        yield worker, share
