"""Placement of a request on several workers: those with fast links to its home, and as few others as possible.

Every decode step asks all holders of a request, one exchange for each layer. So its KV stays on an island, workers with
fast links, even if others have more room; a request that will fit there once others have ended waits for that. A
request larger than every island uses as few hosts behind slow links as possible.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from distkv_dask.placement import Placement
from distkv_dask.scheduler.costs.model import PerformanceModel
from distkv_dask.scheduler.ledger.accounts import WorkerAccount
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.policies.shares import borrow_shares, overflow, placement_from_shares

SLOW = 0.25
"""A link is slow if the exchange for one sequence takes this share of a step without sequences."""
HOSTS_OF_HOMES, HOMES = 4, 8
"""If links were measured: hosts that are tried for a home, and workers of each of them."""

HOSTS = 64
"""Number of hosts that one decision considers: those with the most room."""


def is_slow(model: PerformanceModel, one: WorkerAccount, other: WorkerAccount) -> bool:
    """Whether the link of two workers is slow."""
    return model.exchange(model.link(one.endpoint, other.endpoint), 1) >= SLOW * model.curve.step


def on_several(ledger: Ledger, model: PerformanceModel, tokens: int) -> Placement | None:
    """Place a request that fits on no worker; None while there is no room for it."""
    need = ledger.blocks(tokens)
    tried = [_around(ledger, model, home) for home in _homes(ledger, model)]
    if not tried:
        return overflow(ledger, tokens)
    slow = [around.fewest_slow(need) for around in tried]
    fewest = [around for around, count in zip(tried, slow, strict=True) if count == min(slow)]
    placements = [around.place(ledger, tokens, min(slow)) for around in fewest]
    found = [placement for placement in placements if placement is not None]
    if found:
        return min(found, key=lambda placement: _exchanges(ledger, model, placement))
    if any(len(around.slow) > min(slow) for around in fewest):
        return None
    return overflow(ledger, tokens)  # these are all workers: perhaps with another home


def kept_for(ledger: Ledger, model: PerformanceModel, need: int) -> frozenset[str]:
    """Workers that a request of ``need`` blocks would take once others have ended."""
    tried = [_around(ledger, model, home) for home in _homes(ledger, model)]
    around = min(tried, key=lambda one: one.fewest_slow(need), default=None)
    kept = list[str]()
    for group in () if around is None else ([around.home, *around.own], *around.fast, *around.slow):
        if need <= 0:
            break
        need -= sum(account.capacity for account in group)
        kept += [account.worker for account in group]
    return frozenset(kept)


def _homes(ledger: Ledger, model: PerformanceModel) -> Iterator[WorkerAccount]:
    """Candidates for the home: on the hosts with the most room, those that can lend least first."""
    hosts, each = (HOSTS_OF_HOMES, HOMES) if model.links else (1, 1)
    for _, host in islice(ledger.room.hosts(), hosts):
        own = ledger.room.on_host(host)
        homes = [one for one in own if one.can_decode and not one.retiring and one.free and one.has_place]
        homes.sort(key=lambda account: (account.free - account.lendable, account.free, account.worker), reverse=True)
        yield from homes[:each]


def _exchanges(ledger: Ledger, model: PerformanceModel, placement: Placement) -> float:
    """Seconds of a step's exchanges with all holders of a request."""
    home = ledger.workers[placement[-1].worker].endpoint
    return sum(model.exchange(model.link(home, ledger.workers[span.worker].endpoint), 1) for span in placement[:-1])


@dataclass(frozen=True, slots=True)
class _Around:
    """A home; the workers of its host with fast links to it; groups of others, on one host each, by their links."""

    home: WorkerAccount
    own: list[WorkerAccount]
    fast: list[list[WorkerAccount]]
    slow: list[list[WorkerAccount]]

    def fewest_slow(self, need: int) -> int:
        """Number of groups with slow links for ``need`` blocks on a cluster with only documents."""
        need -= max((_own(one) - _lends(one) for one in (self.home, *self.own) if one.can_decode), default=0)
        need -= sum(_lends(one) for group in ([self.home, *self.own], *self.fast) for one in group)
        count = 0
        for room in sorted((sum(map(_lends, group)) for group in self.slow), reverse=True):
            if need <= 0:
                break
            need -= room
            count += 1
        return count

    def place(self, ledger: Ledger, tokens: int, most: int) -> Placement | None:
        """The home's host down to equal room on its workers, few others, at most ``most`` groups with slow links."""
        need = ledger.blocks(tokens)
        here = min(need, self.home.free + sum(account.lendable for account in self.own))
        others = [*self.fast, *self.slow[:most]]
        far = [one for group in others for one in sorted(group, key=lambda account: -account.lendable)]
        shares = [*borrow_shares(far, need - here), *_level(self.home, self.own, here)]
        if sum(blocks for _, blocks in shares) + self.home.free < need:
            return None
        return placement_from_shares(ledger, self.home.worker, shares, tokens)


def _around(ledger: Ledger, model: PerformanceModel, home: WorkerAccount) -> _Around:
    """Other workers by their links to a home; those with the most room first."""
    near, apart = list[WorkerAccount](), list[WorkerAccount]()
    for one in ledger.room.on_host(home.endpoint.host):
        if one is not home:
            (apart if is_slow(model, home, one) else near).append(one)
    fast, slow = list[list[WorkerAccount]](), [[one] for one in apart if not one.retiring]
    for _, host in islice(ledger.room.hosts(), HOSTS):
        if host != home.endpoint.host:
            group = ledger.room.on_host(host)
            (slow if is_slow(model, home, group[0]) else fast).append(group)
    slow.sort(key=lambda group: -sum(account.lendable for account in group))
    return _Around(home, near, fast, slow)


def _own(account: WorkerAccount) -> int:
    """Blocks for own requests of a worker that has only documents."""
    return 0 if account.retiring else account.capacity - account.documents


def _lends(account: WorkerAccount) -> int:
    """Blocks that such a worker lends."""
    return max(0, min(_own(account), account.lend_limit - account.documents_lent))


def _level(home: WorkerAccount, own: list[WorkerAccount], blocks: int) -> Iterator[tuple[str, int]]:
    """Shares of a host's other workers that leave all, and the home, equal room; the home gets at least one block."""
    rooms = sorted([(account.lendable, account.worker) for account in own if account is not home])
    left, size = blocks, len(rooms) + 1
    total = home.free + sum(room for room, _ in rooms)
    level = (total - blocks) / size  # workers with less room than this lend nothing, so the others lend more
    for room, worker in rooms:
        share = min(room, left - 1, max(0, round(room - level)))
        total -= room
        size -= 1
        left -= share
        level = (total - left) / size
        yield worker, share
