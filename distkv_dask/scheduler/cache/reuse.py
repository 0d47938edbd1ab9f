"""Decides whether a request uses a cached prefix, and where the rest is then placed.

The cache must not change when requests are admitted. So this module runs after room was found for a request, and only
compares placements within that room. Sharing does not always pay: the saved prefill is paid for in every step if a
worker with the prefix has to be queried, or has more work than others.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from distkv_dask.placement import Placement, Span
from distkv_dask.scheduler.cache import beginnings, prefix_cache, snapshots
from distkv_dask.scheduler.commands import Count
from distkv_dask.scheduler.ledger.placements import clipped, shifted
from distkv_dask.scheduler.ledger.supposed import supposed
from distkv_dask.scheduler.policies.base import Ask
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.request import Request


def share(life: MachineState, request: Request, ask: Ask, placement: Placement) -> tuple[Ask, Placement]:
    """What an admitted request computes, and where: with a cached prefix, if that takes less time."""
    document, reuse = life.document_of(request), request.reuse
    if not life.cache or not request.is_plain or (document is not None and document.is_released):
        return ask, placement
    known = request.known
    beginning = known[: len(known) - 1]  # the last one has to be computed
    found = beginnings.find(life, beginning, placement[-1].worker, request.adapter_key)
    if found is not None and life.ledger.has_states:
        reuse.common = max(reuse.common, found[1])
        found = _with_snapshot(life, beginning, request.adapter_key)
    if found is None or found[1] <= ask.shared or not beginnings.can_be_shared(life, found[0]):
        return ask, placement
    better = _better(life, request, ask, placement, *found)
    if better is None:
        return ask, placement
    if document is not None:
        life.demand(document.sequence).dependents.discard(request.sequence)
    request.borrow(found[0])
    reuse.begins, reuse.shared = found
    prefix_cache.share_cached(life, *found, request.sequence)
    life.command(Count("reused_memory_tokens", found[1]))
    return better


def _with_snapshot(life: MachineState, tokens: array[int], adapter: str) -> tuple[int, int] | None:
    """The cached sequence with the last snapshot in a prompt's beginning, and the number of tokens before it."""
    some = (one for one in snapshots.find(life, tokens, adapter) if one[0] in life.cache.by_number)
    return next((one for one in some if beginnings.begins(life, one[0], tokens, one[1], adapter)), None)


def _better(
    life: MachineState, request: Request, ask: Ask, placement: Placement, document: int, tokens: int
) -> tuple[Ask, Placement] | None:
    """The request and its placement with a cached prefix, if it takes less time than without."""
    more = tokens - ask.shared
    home = life.snapshots.homes[document] if life.ledger.has_states else ""
    less = replace(ask, document=document, shared=tokens, prompt=ask.prompt - more, tokens=ask.tokens - more, home=home)
    prefix = beginnings.prefix(life, document, tokens)
    some = [((*prefix, *rest), less) for rest in _rests(life, ask, less, placement, prefix)]
    best, asked = min([(placement, ask), *some], key=lambda one: seconds(life, request, one[1], one[0]))
    return None if asked is ask else (less, best)


def _rests(life: MachineState, ask: Ask, less: Ask, placement: Placement, prefix: Placement) -> Iterator[Placement]:
    """Candidate placements of the tokens that are not shared.

    As admitted, all on the worker where the shared ones end, or as the policy places them next to the shared ones.
    """
    assert less.document is not None
    missing = beginnings.missing(life, less.document, less.shared)
    if any(life.ledger.workers[span.worker].retiring for span in prefix):
        return
    anyway = tuple(clipped(placement, less.shared, placement[-1].stop))
    behind = (Span(less.home or prefix[-1].worker, less.shared, placement[-1].stop),)
    ahead = next(life.queue.turns(), None)
    rank = life.policy.rank
    passes = ahead is not None and rank(life.ledger, ahead) < rank(life.ledger, ask)
    beside = _beside(life, less, missing, prefix[-1].worker, ahead if passes else None)
    for rest in dict.fromkeys((anyway, behind, beside)):
        workers = missing.keys() | {span.worker for span in rest}
        if passes and not workers <= {span.worker for span in placement}:
            continue  # it must not take the room that another request waits for
        if rest and less.home in ("", rest[-1].worker) and _fits(life, missing, rest):
            yield rest


def _beside(life: MachineState, ask: Ask, missing: Counter[str], last: str, ahead: Ask | None) -> Placement:
    """The policy's placement of the rest of a request, with room for the shared part; empty if it finds none."""
    taken, at = [], 0
    for worker in sorted(missing, key=last.__eq__):  # the last one counts as its home, the others lend
        if missing[worker] > life.ledger.workers[worker].free:
            return ()
        taken.append(Span(worker, at, at + missing[worker] * life.ledger.block_tokens))
        at = taken[-1].stop
    with supposed(life.ledger, ask.sequence, tuple(taken)):
        rest = life.policy.place(life.ledger, ask, ahead)
    return shifted(rest or (), ask.shared)


def _fits(life: MachineState, missing: Counter[str], rest: Placement) -> bool:
    """Whether there is room for blocks that return to the ledger, and for a request's own."""
    home = life.ledger.workers[rest[-1].worker]
    if not home.can_decode or home.retiring or not home.has_place:
        return False
    blocks = missing.copy()
    for span in rest:
        blocks[span.worker] += life.ledger.blocks(span.tokens)
    accounts = ((life.ledger.workers[worker], count) for worker, count in blocks.items())
    return all(count <= (one.free if one is home else one.lendable) for one, count in accounts)


def seconds(life: MachineState, request: Request, ask: Ask, placement: Placement) -> float:
    """How long a request would take on a placement, by the performance model."""
    model, accounts = life.policy.model, life.ledger.workers
    home = accounts[placement[-1].worker]
    tokens: Counter[str] = Counter()
    for span in placement:
        tokens[span.worker] += span.tokens
    attention = max(count * model.of(worker).token for worker, count in tokens.items())
    links = (model.link(home.endpoint, accounts[one].endpoint) for one in tokens if one != home.worker)
    curve = model.of(home.worker)
    step = curve.decode(home.homed + 1, 0) + attention + sum(model.exchange(link, 1) for link in links)
    prompt = curve.prefill(home.pending) + curve.prefill(ask.prompt, ask.shared)
    return prompt + _exchange_seconds(life, ask, placement) + request.remaining * step


def _exchange_seconds(life: MachineState, ask: Ask, placement: Placement) -> float:
    """Seconds for the exchanges of a prompt's tokens: all workers with earlier tokens attend to each."""
    model, accounts = life.policy.model, life.ledger.workers
    seconds, before = 0.0, set[str]()
    for span in placement:
        here = accounts[span.worker].endpoint
        rows = min(span.stop, ask.shared + ask.prompt) - max(span.start, ask.shared)
        if rows > 0:
            links = (model.link(here, accounts[worker].endpoint) for worker in before - {span.worker})
            seconds += sum(model.exchange(link, rows) for link in links)
        before.add(span.worker)
    return seconds
