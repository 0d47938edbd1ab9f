"""Spread: which workers compute a long prompt at the same time, if they would otherwise be idle.

Every worker gets pieces of it, in turns, and keeps their KV. So more workers also attend in each decode step; the
performance model therefore compares times of the whole request.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from distkv_dask.placement import Placement, Span
from distkv_dask.scheduler.commands import Note
from distkv_dask.scheduler.costs.pieces import equal_pieces, seconds_of_pieces
from distkv_dask.scheduler.ledger.accounts import WorkerAccount
from distkv_dask.scheduler.policies.base import Ask
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.work.chunks import next_chunks

PAYS = 0.9
"""A prompt is spread only if its request then takes at most this part of its time."""

NOTHING: Mapping[str, int] = MappingProxyType({})

Pieces = Sequence[tuple[str, int, int]]
"""Workers in their turns, with the tokens ``[start, stop)`` that they compute; the last worker is the home."""


class Task(NamedTuple):
    """The work of a request: ``prompt`` tokens after ``before`` earlier ones, and at most ``answer`` tokens.

    ``held`` are the blocks that are already reserved for it, by worker.
    """

    home: WorkerAccount
    before: int
    prompt: int
    answer: int
    held: Mapping[str, int] = NOTHING


def spread(life: MachineState, ask: Ask, placement: Placement) -> Placement:
    """The placement of an admitted request: as the policy chose it, or with its prompt on several workers in turns."""
    workers = life.config.prefill_workers
    own = [span for span in placement if span.start >= ask.shared]
    if workers in (1, "auto") or len(own) != 1 or ask.is_document or ask.prompt <= life.config.prefill_chunk_tokens:
        return placement  # a request that does not fit one worker is already on several
    home = life.ledger.workers[own[0].worker]
    idle = [one.worker for one in helpers(life, home)]
    task = Task(home, ask.shared, ask.prompt, ask.tokens - ask.prompt)
    pieces = best(life, task, idle[: int(workers) - 1], math.inf)
    if len(pieces) == 1:
        return placement
    count = len({worker for worker, _, _ in pieces})
    life.command(Note("wavefront", f"{ask.prompt} tokens of prompt {ask.sequence} by {count} workers at once"))
    shared = tuple(span for span in placement if span.start < ask.shared)
    return (*shared, *spans_of(pieces, placement[-1].stop))


def helpers(life: MachineState, home: WorkerAccount, sequence: int | None = None) -> Iterator[WorkerAccount]:
    """Workers without work, except for a ``sequence``, while no request waits; the best first."""
    busy = {chunk.gang.home for chunk in next_chunks(life) if chunk.sequence != sequence}
    if life.queue or life.ledger.has_states or life.config.granularity != "window" or home.worker in busy:
        return
    idle = [
        one
        for one in life.ledger.workers.values()
        if one is not home and one.can_decode and one.worker not in busy and not _is_used(one, sequence)
    ]
    yield from sorted(
        (one for one in idle if one.lendable),
        key=lambda one: (
            life.policy.model.exchange(life.policy.model.link(home.endpoint, one.endpoint), 1),
            life.policy.model.of(one.worker).prefill(life.config.prefill_chunk_tokens),
            one.worker,
        ),
    )


def _is_used(worker: WorkerAccount, sequence: int | None) -> bool:
    """Whether a worker decodes anything, or attends for sequences other than this one."""
    held = worker.held.get(sequence, 0) if sequence is not None else 0
    return bool(worker.homed) or worker.lent - worker.documents_lent > held


def best(life: MachineState, task: Task, idle: Sequence[str], pays: float) -> Pieces:
    """The pieces that end soonest, with help of the ``idle`` workers; one piece if that hardly ``pays``."""
    alone = [(task.home.worker, task.before, task.before + task.prompt)]
    ways = [_pieces(life, task, idle[: count - 1]) for count in range(2, len(idle) + 2)]
    fitting = [pieces for pieces in ways if _fits(life, task, pieces)]
    if not fitting:
        return alone
    found = min(fitting, key=lambda pieces: _seconds(life, task, pieces))
    return alone if _seconds(life, task, found) > pays * _seconds(life, task, alone) else found


def spans_of(pieces: Pieces, stop: int) -> tuple[Span, ...]:
    """The spans of pieces; the last one has room up to ``stop``."""
    *some, (home, start, _) = pieces
    return (*(Span(*piece) for piece in some), Span(home, start, stop))


def _pieces(life: MachineState, task: Task, helping: Sequence[str]) -> Pieces:
    step, unit = life.config.prefill_chunk_tokens, life.ledger.block_tokens
    cut = equal_pieces(life.policy.model, [*helping, task.home.worker], task.prompt, step, unit)
    return [(worker, task.before + first, task.before + last) for worker, first, last in cut]


def _fits(life: MachineState, task: Task, pieces: Pieces) -> bool:
    """Whether all workers have room for their pieces, in addition to what is already reserved."""
    blocks: Counter[str] = Counter()
    for span in spans_of(pieces, task.before + task.prompt + task.answer):
        blocks[span.worker] += life.ledger.blocks(span.tokens)
    rooms = {worker: life.ledger.workers[worker].lendable for worker in blocks} | {task.home.worker: task.home.free}
    return all(rooms[worker] + task.held.get(worker, 0) >= count for worker, count in blocks.items())


def _seconds(life: MachineState, task: Task, pieces: Pieces) -> float:
    """How long the whole request takes, prompt and longest answer."""
    model, accounts, home = life.policy.model, life.ledger.workers, task.home
    ends = {worker: accounts[worker].endpoint for worker, _, _ in pieces}
    tokens: Counter[str] = Counter({home.worker: task.before + task.answer})
    for worker, first, last in pieces:
        tokens[worker] += last - first
    attention = max(count * model.of(worker).token for worker, count in tokens.items())
    links = (model.link(home.endpoint, end) for worker, end in ends.items() if worker != home.worker)
    step = model.of(home.worker).decode(home.homed + 1, 0) + attention + sum(model.exchange(link, 1) for link in links)
    own = [(worker, first - task.before, last - task.before) for worker, first, last in pieces]
    return seconds_of_pieces(model, own, ends, task.before) + task.answer * step
