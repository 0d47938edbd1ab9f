"""Which products serve a linear's bfloat16 weights fastest here, by number of rows, timed once per process.

The candidates are torch's own, oneDNN's with packed weights, and the C++ core's (:mod:`distkv_dask.kernels.few_rows`)
by instruction set.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from distkv_dask.kernels import few_rows
from distkv_dask.worker.model.packed import ONEDNN, TORCH, Choice, PackedLinear

ROWS = (1, 4, 16, 64, 256, 512)
"""Numbers of rows that are timed: one sequence, batches that decode, prompts computed together, a chunk of one."""
WEIGHTS, OUTPUTS, INPUTS = 8, 1536, 576
"""Linears of a round, together too large for a core's own cache, and their sizes, those of a small model."""
ROUNDS = 3
IN_LAYERS = 1.25
"""A layer of the core, which needs no operations of torch between its products, pays with products that take as long as
this beside the fastest ones."""
BEATEN = 1.5
"""A candidate that is slower than the best by this factor is not timed in further rounds."""

Product = Callable[[Tensor], Tensor]


def chosen() -> Choice:
    """The choice for torch's current number of threads."""
    return _chosen(torch.get_num_threads())


@lru_cache
def _chosen(threads: int) -> Choice:
    return choice(timed(), few_rows.sets())


def choice(times: Mapping[int, Mapping[str, float]], sets: Sequence[str]) -> Choice:
    """Use the core's products up to the last number of rows that they serve fastest, from one row on.

    Parameters
    ----------
    times
        Seconds by number of rows in rising order, and by ``TORCH``, ``ONEDNN`` or one of ``sets``.
    sets
        Instruction sets of the core's products.
    """
    few: list[tuple[int, str]] = []
    alone = 0
    for rows, by_name in times.items():
        ours = {name: by_name[name] for name in sets if name in by_name}
        slower = min(ours.values(), default=float("inf")) / min(by_name.values())
        if slower > (IN_LAYERS if few else 1):
            break
        if slower <= 1 and (not few or alone == few[-1][0]):  # as with all smaller numbers
            alone = rows
        best = fastest(ours)
        if few and few[-1][1] == best:
            few.pop()
        few.append((rows, best))
    first = next(iter(times.values()), {TORCH: 0.0})
    return Choice(tuple(few), alone, onednn=not few and fastest(first) == ONEDNN)


def fastest(times: Mapping[str, float]) -> str:
    """The name with the shortest time."""
    return min(times, key=lambda name: times[name])


def timed() -> dict[int, dict[str, float]]:
    """Seconds of a round by number of rows and candidate, the best of a few alternating rounds: about 0.2 s in all."""
    with torch.inference_mode():
        weights = [torch.full((OUTPUTS, INPUTS), 0.01, dtype=torch.bfloat16) for _ in range(WEIGHTS)]
        products = candidates(weights)
        return {rows: _best(products, torch.ones(rows, INPUTS, dtype=torch.bfloat16)) for rows in ROWS}


def candidates(weights: Sequence[Tensor]) -> dict[str, list[Product]]:
    """The products of some weights [outputs, inputs], in bfloat16, by the name of the candidate."""
    made: dict[str, list[Product]] = {TORCH: [partial(_plain, weight) for weight in weights]}
    if torch.backends.mkldnn.is_available():
        with suppress(RuntimeError):  # oneDNN has no bfloat16 on this processor
            made[ONEDNN] = [PackedLinear(weight, None) for weight in weights]
    packed = [few_rows.packed(weight) for weight in weights]
    for name in few_rows.sets():
        made[name] = [
            few_rows.FewRows(each, (weight.shape[0], weight.shape[1]), None, ((ROWS[-1], name),))
            for each, weight in zip(packed, weights, strict=True)
        ]
    return made


def _plain(weight: Tensor, rows: Tensor) -> Tensor:
    return linear(rows, weight)


def _best(products: Mapping[str, list[Product]], rows: Tensor) -> dict[str, float]:
    best: dict[str, float] = {}
    for _ in range(ROUNDS):
        for name, linears in products.items():
            if best.get(name, 0.0) > BEATEN * min(best.values(), default=0.0):
                continue
            began = time.perf_counter()
            for product in linears:
                product(rows)
            best[name] = min(best.get(name, float("inf")), time.perf_counter() - began)
    return best
