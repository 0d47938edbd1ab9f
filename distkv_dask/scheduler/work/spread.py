"""Spread: which workers compute a long prompt at the same time, when others would do nothing meanwhile.

Every worker gets pieces of it, in turns, and keeps their KV. So more workers also attend in each decode step; the whole
request is weighed by the performance model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from distkv_dask.placement import Placement, Span
from distkv_dask.scheduler.commands import Note
from distkv_dask.scheduler.costs.pieces import equal_pieces, seconds_of_pieces
from distkv_dask.scheduler.ledger.accounts import WorkerAccount
from distkv_dask.scheduler.policies.base import Ask
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.work.prefill import next_chunks

PAYS = 0.9
"""Part of its time that a request takes at most when its prompt is spread."""


def spread(life: MachineState, ask: Ask, placement: Placement) -> Placement:
    """Where a request lies that just found room: where it was placed, or its prompt on several workers in turns."""
    workers = life.config.prefill_workers
    own = [span for span in placement if span.start >= ask.shared]
    if workers == "auto" and life.config.deterministic:
        return placement  # borders of spans, which bits depend on, must not depend on the load
    if workers == 1 or len(own) != 1 or ask.is_document or ask.prompt <= life.config.prefill_chunk_tokens:
        return placement  # what does not fit one worker is on several already
    home = life.ledger.workers[own[0].worker]
    helpers = list(_helpers(life, home))
    most = 1 + len(helpers) if workers == "auto" else min(1 + len(helpers), int(workers))
    ways = [_pieces(life, ask, [one.worker for one in helpers[: count - 1]], home) for count in range(2, most + 1)]
    fitting = [pieces for pieces in ways if _fits(life, home, pieces)]
    if not fitting:
        return placement
    alone = _seconds(life, ask, [(home.worker, 0, ask.prompt)])
    best = min(fitting, key=lambda pieces: _seconds(life, ask, pieces))
    if workers == "auto" and _seconds(life, ask, best) > PAYS * alone:
        return placement
    count = len({worker for worker, _, _ in best})
    life.command(Note("wavefront", f"{ask.prompt} tokens of prompt {ask.sequence} by {count} workers at once"))
    spans = [Span(worker, ask.shared + first, ask.shared + last) for worker, first, last in best]
    shared = tuple(span for span in placement if span.start < ask.shared)
    return (*shared, *spans[:-1], Span(home.worker, spans[-1].start, placement[-1].stop))


def _helpers(life: MachineState, home: WorkerAccount) -> Iterator[WorkerAccount]:
    """Workers that do nothing while nobody waits, the best first."""
    busy = {chunk.gang.home for chunk in next_chunks(life)}
    if life.queue or life.ledger.has_states or life.config.granularity != "window" or home.worker in busy:
        return
    idle = [
        one
        for one in life.ledger.workers.values()
        if one is not home and one.can_decode and not (one.homed or one.lent - one.documents_lent or one.worker in busy)
    ]
    yield from sorted(
        (one for one in idle if one.lendable),
        key=lambda one: (
            one.endpoint.host != home.endpoint.host,
            life.policy.model.of(one.worker).prefill(life.config.prefill_chunk_tokens),
            one.worker,
        ),
    )


def _pieces(life: MachineState, ask: Ask, helpers: Sequence[str], home: WorkerAccount) -> list[tuple[str, int, int]]:
    step, unit = life.config.prefill_chunk_tokens, life.ledger.block_tokens
    return equal_pieces(life.policy.model, [*helpers, home.worker], ask.prompt, step, unit)


def _fits(life: MachineState, home: WorkerAccount, pieces: Sequence[tuple[str, int, int]]) -> bool:
    """Whether the helpers lend what the pieces need; the home had room for all of it."""
    blocks: Counter[str] = Counter()
    for worker, first, last in pieces:
        blocks[worker] += life.ledger.blocks(last - first)
    return all(
        life.ledger.workers[worker].lendable >= count for worker, count in blocks.items() if worker != home.worker
    )


def _seconds(life: MachineState, ask: Ask, pieces: Sequence[tuple[str, int, int]]) -> float:
    """How long the whole request takes, prompt and longest answer."""
    model, accounts = life.policy.model, life.ledger.workers
    home = accounts[pieces[-1][0]]
    hosts = {worker: accounts[worker].endpoint.host for worker, _, _ in pieces}
    tokens: Counter[str] = Counter({home.worker: ask.shared + ask.tokens - ask.prompt})
    for worker, first, last in pieces:
        tokens[worker] += last - first
    attention = max(count * model.of(worker).token for worker, count in tokens.items())
    links = (model.link(home.endpoint.host, hosts[worker]) for worker in hosts if worker != home.worker)
    step = model.of(home.worker).decode(home.homed + 1, 0) + attention + sum(model.exchange(link, 1) for link in links)
    return seconds_of_pieces(model, pieces, hosts, ask.shared) + (ask.tokens - ask.prompt) * step
