"""Pieces of a prompt that several workers compute at the same time, so that all of them end together. Pure.

A token costs its worker the forward, and attention of all later tokens of the prompt, which is computed where its KV
is. So early tokens cost more than late ones. In each round all workers get pieces that cost the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

from distkv_dask.placement import Endpoint
from distkv_dask.scheduler.costs.model import PerformanceModel


def equal_pieces(
    model: PerformanceModel, workers: Sequence[str], tokens: int, step: int, unit: int
) -> list[tuple[str, int, int]]:
    """Cut ``tokens`` tokens into pieces of at most ``step`` tokens for these workers, in turns; the last gets the end.

    Parameters
    ----------
    model
        Whose curves say how fast each worker is.
    workers
        In the order of their turns.
    tokens, step
        Of the prompt, and of the longest piece.
    unit
        Inner borders are multiples of it (in tokens), so pieces may be longer than ``step`` by less than this.

    Examples
    --------
    >>> from distkv_dask.scheduler.costs.presets import PRESET
    >>> equal_pieces(PRESET, ["a", "b"], 1000, 400, 64)
    [('a', 0, 256), ('b', 256, 512), ('a', 512, 768), ('b', 768, 1000)]
    """
    speeds = {worker: 1 / model.of(worker).prefill(tokens) for worker in workers}
    shares = [speeds[worker] / sum(speeds.values()) for worker in workers]
    prompt = sum(model.of(worker).prompt * share for worker, share in zip(workers, shares, strict=True))
    pair = sum(model.of(worker).pair * share for worker, share in zip(workers, shares, strict=True))
    first = prompt + pair * tokens  # cost of the first token; that of token t is less by pair * t

    def end_of(cost: float) -> float:
        return 2 * cost / (first + math.sqrt(max(0.0, first**2 - 2 * pair * cost)))

    def cost_of(end: float) -> float:
        return first * end - pair * end**2 / 2

    rounds = math.ceil(tokens / step / len(workers))
    while True:
        costs = [cost_of(tokens * at / rounds) for at in range(rounds + 1)]
        ends = [
            end_of(before + share * (after - before))
            for before, after in pairwise(costs)
            for share in accumulate(shares)
        ]
        borders = [min((tokens - 1) // unit * unit, round(end / unit) * unit) for end in ends[:-1]]
        pieces = list(zip([*workers] * rounds, [0, *borders], [*borders, tokens], strict=True))
        if max(stop - start for _, start, stop in pieces) < step + unit:
            return [(worker, start, stop) for worker, start, stop in pieces if start < stop]
        rounds += 1


def seconds_of_pieces(
    model: PerformanceModel, pieces: Sequence[tuple[str, int, int]], ends: Mapping[str, Endpoint], before: int = 0
) -> float:
    """Seconds until the last worker has computed its pieces, if all start at once.

    ``before`` tokens of KV come before the prompt, on the worker of the last piece. ``ends`` are where workers listen.
    """
    last, end = pieces[-1][0], pieces[-1][2]
    seconds = dict.fromkeys((worker for worker, _, _ in pieces), 0.0)
    seconds[last] += before * end * model.of(last).pair
    asked: dict[str, None] = {}
    for worker, first, stop in pieces:
        size, curve = stop - first, model.of(worker)
        links = [model.link(ends[worker], ends[other]) for other in asked if other != worker]
        attended = size * (end - stop + size / 2)  # by the piece's own queries and by all later ones
        seconds[worker] += size * curve.prompt + attended * curve.pair
        seconds[worker] += sum(model.exchange(link, size) for link in links)
        asked[worker] = None
    return max(seconds.values())
