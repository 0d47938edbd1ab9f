"""Our own policy: each request on as few hosts as possible, work spread evenly, room of waiting requests used.

Beyond the paper's greedy:

* Links first (:mod:`~distkv_dask.scheduler.policies.several`). A request that fits on one worker stays there, a larger
one on workers whose links are fast. A request waits rather than use a slow link in every step.
* While it waits, its future workers are kept free for it and later requests use the others: no request starves, and
little room is idle.
* The request that takes longest (prompt and answer) starts first, so that short requests fill the room between long
ones and a batch does not end with one long request on an idle cluster. Requests with a priority want latency: among
them, short ones start first. Both are bounded by a lead in seconds, so no request waits forever.
* The home is the worker with room that would finish first, by the performance model.
* On a host, blocks are spread so that all workers keep equal room: all of them compute attention over a long request in
parallel, and none becomes a bottleneck.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import ClassVar

from distkv_dask.placement import Move, Placement, Span
from distkv_dask.scheduler.ledger.accounts import WorkerAccount
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.policies.balance import recalls, share_with_idle
from distkv_dask.scheduler.policies.base import Ask, Policy
from distkv_dask.scheduler.policies.several import kept_for, on_several

CANDIDATES = 16
"""Number of candidates for a home: the workers with the most room."""
LEAD = 600.0
"""Maximum seconds by which one request may overtake another because of its work."""


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
        return None if kept else on_several(ledger, self.model, ask.tokens)

    def moves(self, ledger: Ledger, waiting: Iterable[Ask]) -> list[Move]:
        """Recalls, else a share for an idle worker."""
        return recalls(ledger, waiting) or share_with_idle(ledger, self.model)

    def rank(self, ledger: Ledger, ask: Ask) -> float:
        """The longest requests first, or the shortest among those with a priority."""
        curve = self.model.curve
        pool = ledger.capacity_blocks * ledger.block_tokens // max(1, len(ledger.workers))
        step = curve.decode(1, min(ask.tokens, pool))  # several workers attend to sequences larger than a pool
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
        return kept_for(ledger, self.model, need)
