"""Which products serve a linear's bfloat16 weights fastest here, by number of rows, timed once per machine.

The candidates are torch's own, oneDNN's with packed weights, and the C++ core's (:mod:`distkv_dask.kernels.few_rows`)
by instruction set.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from distkv_dask.kernels import few_rows, native_kernel
from distkv_dask.kernels.instruction_sets import Times, contenders, repeat
from distkv_dask.worker.model.packed import ONEDNN, TORCH, Choice, PackedLinear
from distkv_dask.worker.timing.machine_times import machine_times
from distkv_dask.worker.timing.measurement_cache import hardware

FORM = 2
"""Version of the measurement."""
ROWS = (1, 4, 16, 64, 256, 512)
"""Numbers of rows that are timed: one sequence, batches that decode, prompts computed together, a chunk of one."""
WEIGHTS, OUTPUTS, INPUTS = 8, 1536, 576
"""Linears of a round, together too large for a core's own cache, and their sizes, those of a small model."""
ROUNDS, MOST_ROUNDS = 3, 6
"""Rounds at least, and at most if times do not repeat."""
CALM = 0.01
"""Seconds before a candidate: a library's threads look for work for milliseconds, on the processors of the next one."""
ALIKE = 1.1
"""Products that take as long as this beside the fastest ones count as equally fast: that is chance."""
IN_LAYERS = 1.25
"""A layer of the core, which needs no operations of torch between its products, pays with products that take as long as
this beside the fastest ones."""
REPEATED = 1.1
"""If the two best times of a candidate differ by more, something else used the processor."""

Product = Callable[[Tensor], Tensor]
Seconds = Mapping[int, Mapping[str, float]]
"""Seconds by number of rows in rising order, and by candidate: ``TORCH``, ``ONEDNN`` or an instruction set."""


@dataclass(frozen=True, slots=True)
class LinearTimes:
    """The two best times of each candidate in seconds, the best first, by number of rows."""

    by_rows: Mapping[int, Times]

    @property
    def settled(self) -> bool:
        """Whether the best time of each candidate that may be chosen came twice."""
        return all(repeat(times, REPEATED) for times in self.by_rows.values())

    @property
    def best(self) -> Seconds:
        """The best times."""
        return {rows: {name: min(times) for name, times in by_name.items()} for rows, by_name in self.by_rows.items()}

    def as_json(self) -> dict[str, Any]:
        """What :meth:`of_json` reads."""
        return {"rows": {str(rows): by_name for rows, by_name in self.by_rows.items()}}

    @classmethod
    def of_json(cls, kept: Any) -> LinearTimes:
        """What :meth:`as_json` gave; raises ValueError, KeyError or TypeError for anything else."""
        rows = {
            int(rows): {str(name): (float(best), float(second)) for name, (best, second) in by_name.items()}
            for rows, by_name in kept["rows"].items()
        }
        if tuple(rows) != ROWS or not all(TORCH in by_name for by_name in rows.values()):
            raise ValueError(f"times of {list(rows)} rows")
        return cls(rows)


def chosen() -> Choice:
    """The choice for torch's current number of threads."""
    return _chosen(torch.get_num_threads())


@lru_cache
def _chosen(threads: int) -> Choice:
    key = {"form": FORM, "linears": native_kernel.fingerprint(), "threads": threads, **hardware("cpu")}
    times = machine_times(key, timed, (LinearTimes.of_json, LinearTimes.as_json))
    return choice(times.best, few_rows.sets())


def choice(times: Seconds, sets: Sequence[str]) -> Choice:
    """Use the core's products up to the last number of rows that they serve fastest, from one row on.

    ``sets`` are the instruction sets of the core's products.
    """
    few: list[tuple[int, str]] = []
    alone = 0
    for rows, by_name in times.items():
        ours = {name: by_name[name] for name in sets if name in by_name}
        slower = min(ours.values(), default=float("inf")) / min(by_name.values())
        if slower > (IN_LAYERS if few else ALIKE):
            break
        if slower <= ALIKE and (not few or alone == few[-1][0]):  # as with all smaller numbers
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


def timed(known: LinearTimes | None = None) -> LinearTimes:
    """The best times of a few rounds, about a second in all, and of those already ``known``."""
    with torch.inference_mode():
        weights = [torch.full((OUTPUTS, INPUTS), 0.01, dtype=torch.bfloat16) for _ in range(WEIGHTS)]
        products = candidates(weights)
        inputs = {rows: torch.ones(rows, INPUTS, dtype=torch.bfloat16) for rows in ROWS}
        before = known.by_rows if known else {rows: {} for rows in ROWS}
        best: dict[int, dict[str, tuple[float, ...]]] = {
            rows: {name: before[rows].get(name, (math.inf, math.inf)) for name in products} for rows in ROWS
        }
        for done in range(MOST_ROUNDS):
            if not (todo := [rows for rows in ROWS if done < ROUNDS or not repeat(best[rows], REPEATED)]):
                break
            for name, linears in products.items():
                time.sleep(CALM)
                for rows in todo:
                    times = best[rows]
                    if name in contenders(times) or math.inf in times[name]:  # one slow time may be chance
                        times[name] = tuple(sorted([*times[name], _seconds(linears, inputs[rows])])[:2])
        return LinearTimes(best)


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


def _seconds(linears: Sequence[Product], rows: Tensor) -> float:
    linears[0](rows)  # wakes its threads
    began = time.perf_counter()
    for product in linears:
        product(rows)
    return time.perf_counter() - began
