"""The time of a batch by the performance model: seconds of prefill and decode from numbers of tokens alone. Pure.

A worker has one lane: prefill and decode steps add up on it. Requests go to the worker that will be free first. Those
of a worker decode together, as many as its batch and the KV memory have room for.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil

from distkv_dask.client.batch.needs import Need
from distkv_dask.messages.status import WorkerPerformance


@dataclass(frozen=True, slots=True)
class Means:
    """The workers that answer a batch.

    Parameters
    ----------
    speeds
        Speed of each worker that has the model.
    kv_tokens
        Tokens of KV for which all workers together have room.
    batch
        Maximum sequences that a worker decodes together.
    exchange
        Seconds of a decode step's exchange with one holder.
    basis
        Where the figures come from, for people.
    """

    speeds: tuple[WorkerPerformance, ...]
    kv_tokens: int
    batch: int
    exchange: float
    basis: str


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds of work, of all workers together, and from beginning to end."""

    prefill: float
    decode: float
    seconds: float


def pace_of(needs: Iterable[Need], means: Means) -> Pace:
    """Predict a batch; answers are as long as they may be."""
    asked = [one for one in needs if one.error is None and one.prompts]
    if not asked:
        return Pace(0.0, 0.0, 0.0)
    together = _together(asked, means)
    lanes = [(0.0, number) for number in range(len(means.speeds))]
    heapq.heapify(lanes)
    given: list[list[Need]] = [[] for _ in lanes]
    for one in asked:
        load, number = heapq.heappop(lanes)
        given[number].append(one)
        load += prefill_seconds(one, means.speeds[number]) + _share(one, means.speeds[number], together)
        heapq.heappush(lanes, (load, number))
    prefills, decodes = [], []
    for needs_, speed in zip(given, means.speeds, strict=True):
        prefills.append(sum(prefill_seconds(one, speed) for one in needs_))
        decodes.append(decode_seconds(needs_, speed, together, _holders(needs_, means) * means.exchange))
    longest = max(one + other for one, other in zip(prefills, decodes, strict=True))
    return Pace(sum(prefills), sum(decodes), longest)


def kv_tokens(need: Need) -> int:
    """Tokens of KV that its largest request has at its end, including those of its document."""
    return max(need.prompts) + max(0, need.answers * need.new - 1)


def prefill_seconds(need: Need, speed: WorkerPerformance) -> float:
    """Seconds to compute its prompts, and the document if this question computes it."""
    own = sum(_prefill(tokens - need.shared, need.shared, speed) for tokens in need.prompts)
    return own + _prefill(need.document, 0, speed)


def decode_seconds(needs: Sequence[Need], speed: WorkerPerformance, together: int, exchange: float) -> float:
    """Seconds of a worker's decode steps, in batches of ``together`` requests."""
    answers = sorted((one.new for one in needs for _ in range(len(one.prompts) * one.answers)), reverse=True)
    steps = sum(answers[::together])  # those that begin together, the longest first
    return steps * (speed.step + exchange) + sum(_rows(one, speed) for one in needs)


def new_tokens(speed: WorkerPerformance, together: int) -> float:
    """How many prompt tokens take as long as one token of an answer, decoded in a batch of ``together``."""
    return (speed.step / together + speed.row) / max(speed.prompt, 1e-9)


def _prefill(tokens: int, before: int, speed: WorkerPerformance) -> float:
    return tokens * speed.prompt + tokens * (before + tokens / 2) * speed.pair


def _rows(need: Need, speed: WorkerPerformance) -> float:
    """Seconds that its rows add to decode steps; tokens of a shared document are read once for all."""
    own = sum(tokens - need.shared + need.new / 2 for tokens in need.prompts) + need.document
    return need.answers * need.new * (len(need.prompts) * speed.row + own * speed.token)


def _share(need: Need, speed: WorkerPerformance, together: int) -> float:
    return need.answers * len(need.prompts) * need.new * speed.step / together + _rows(need, speed)


def _together(asked: Sequence[Need], means: Means) -> int:
    """How many requests a worker decodes together."""
    workers, requests = len(means.speeds), sum(one.answers * len(one.prompts) for one in asked)
    kept = sum(sum(one.prompts) + len(one.prompts) * (one.answers * one.new - one.shared) for one in asked)
    each = (kept + sum(one.document for one in asked)) / requests
    room = int(means.kv_tokens / max(1.0, each) / workers)
    return max(1, min(means.batch, room, ceil(requests / workers)))


def _holders(needs: Sequence[Need], means: Means) -> int:
    """Workers other than the home that hold KV of the longest request."""
    own = means.kv_tokens / len(means.speeds)
    return max((ceil(kv_tokens(one) / max(1.0, own)) - 1 for one in needs), default=0)
