"""Whether a request takes a cached beginning, and where it lies then. Pure.

The cache must not change what is admitted when, so a request has got its room already when it comes here: what it
shares is decided between placements that keep to that room. Sharing is not always worth it: what a prompt is spared is
paid for in every step, where a worker with the beginning has to be asked or has more to do than others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, MutableMapping
from dataclasses import replace

from distkv_dask.scheduler.kept.prefix_cache import PrefixCache
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.ledger.placements import clipped, shifted
from distkv_dask.scheduler.lifecycle.request import Live
from distkv_dask.scheduler.policies.base import Ask
from distkv_dask.scheduler.policies.queue import Admission
from distkv_dask.types import Placement, Span


class Reuse:
    """Decides for one engine's requests.

    Parameters
    ----------
    cache, ledger, live, queue
        The lifecycle's.
    """

    def __init__(self, cache: PrefixCache, ledger: Ledger, live: MutableMapping[int, Live], queue: Admission) -> None:
        self._cache = cache
        self._ledger = ledger
        self._live = live
        self._queue = queue

    def share(self, live: Live, ask: Ask, placement: Placement, now: float) -> Ask:
        """What a request that was just admitted computes: with a cached beginning, if that takes less time.

        Then it lies elsewhere than at the ``placement`` that it got.
        """
        if not self._cache or not live.is_plain or (live.document is not None and self._live[live.document].released):
            return ask
        known = live.known
        found = self._cache.find(known[: len(known) - 1], placement[-1].worker)  # the last one has to be computed
        if found is None or found[1] <= ask.shared or not self._cache.can_be_shared(found[0]):
            return ask
        self._ledger.release(live.sequence)
        better = self._better(live, ask, placement, *found)
        if better is not None:
            if live.document is not None:
                self._live[live.document].dependents.discard(live.sequence)
            live.document, live.borrows, live.reused = found[0], True, found[1]
            self._cache.use(*found, live.sequence, now)
            ask, placement = better
        self._ledger.reserve(live.sequence, placement, ask.shared + ask.prompt)
        self._ledger.commit(live.sequence, ask.shared)
        return ask

    def _better(
        self, live: Live, ask: Ask, placement: Placement, document: int, tokens: int
    ) -> tuple[Ask, Placement] | None:
        """The request and its placement with a cached beginning, if it takes less time than without."""
        more = tokens - ask.shared
        less = replace(ask, document=document, shared=tokens, prompt=ask.prompt - more, tokens=ask.tokens - more)
        prefix = self._cache.prefix(document, tokens)
        some = [((*prefix, *rest), less) for rest in self._rests(ask, less, placement, prefix)]
        best, asked = min([(placement, ask), *some], key=lambda one: self._seconds(live, one[1], one[0]))
        return None if asked is ask else (less, best)

    def _rests(self, ask: Ask, less: Ask, placement: Placement, prefix: Placement) -> Iterator[Placement]:
        """Where the tokens may lie that are not shared.

        Where they would anyway, all of them where the shared ones end, or where the policy lays them beside those.
        """
        assert less.document is not None
        missing = self._cache.missing(less.document, less.shared)
        if any(self._ledger.workers[span.worker].retiring for span in prefix):
            return
        anyway = tuple(clipped(placement, less.shared, placement[-1].stop))
        behind = (Span(prefix[-1].worker, less.shared, placement[-1].stop),)
        ahead = next(self._queue.turns(), None)
        rank = self._queue.policy.rank
        passes = ahead is not None and rank(self._ledger, ahead) < rank(self._ledger, ask)
        beside = self._beside(less, missing, prefix[-1].worker, ahead if passes else None)
        for rest in dict.fromkeys((anyway, behind, beside)):
            workers = missing.keys() | {span.worker for span in rest}
            if passes and not workers <= {span.worker for span in placement}:
                continue  # it may not take the room that another one waits for
            if rest and self._fits(missing, rest):
                yield rest

    def _beside(self, ask: Ask, missing: Counter[str], last: str, ahead: Ask | None) -> Placement:
        """Where the policy lays the rest of a request when what it shares has its room; nothing if it has none."""
        taken, at = [], 0
        for worker in sorted(missing, key=last.__eq__):  # the last one counts as its home, the others lend
            if missing[worker] > self._ledger.workers[worker].free:
                return ()
            taken.append(Span(worker, at, at + missing[worker] * self._ledger.block_tokens))
            at = taken[-1].stop
        if taken:
            self._ledger.reserve(ask.sequence, tuple(taken), idle=True)
        rest = self._queue.policy.place(self._ledger, ask, ahead)
        if taken:
            self._ledger.release(ask.sequence)
        return shifted(rest or (), ask.shared)

    def _fits(self, missing: Counter[str], rest: Placement) -> bool:
        """Whether there is room for blocks that come back into the ledger, and for a request's own."""
        home = self._ledger.workers[rest[-1].worker]
        if not home.can_decode or home.retiring or home.homed >= self._ledger.room.batch:
            return False
        blocks = missing.copy()
        for span in rest:
            blocks[span.worker] += self._ledger.blocks(span.tokens)
        accounts = ((self._ledger.workers[worker], count) for worker, count in blocks.items())
        return all(count <= (one.free if one is home else one.lendable) for one, count in accounts)

    def _seconds(self, live: Live, ask: Ask, placement: Placement) -> float:
        """How long a request would take on a placement, by the performance model."""
        model, accounts = self._queue.policy.model, self._ledger.workers
        home = accounts[placement[-1].worker]
        tokens: Counter[str] = Counter()
        for span in placement:
            tokens[span.worker] += span.tokens
        attention = max(count * model.of(worker).token for worker, count in tokens.items())
        links = (model.link(home.endpoint.host, accounts[one].endpoint.host) for one in tokens if one != home.worker)
        curve = model.of(home.worker)
        step = curve.decode(home.homed + 1, 0) + attention + sum(model.exchange(link, 1) for link in links)
        prompt = curve.prefill(home.pending) + curve.prefill(ask.prompt, ask.shared)
        return prompt + live.remaining * step
