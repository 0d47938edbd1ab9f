"""Common parts of the benchmarks of few rows: options, and timing of several implementations in turns.

A read of memory takes a turn, too: it is the floor.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from _report import parser
from _roof import read_roof

from distkv_dask.worker.timing.linear_choice import ROWS

Runs = Mapping[str, Callable[[], float]]
"""Implementations of the same computation: each computes once and returns its seconds."""

NAMES = "models", "rows", "threads", "turns"
"""Options that :func:`options_of` adds."""


def options_of(description: str | None, models: Collection[str], rows: Sequence[int]) -> argparse.Namespace:
    """Parse the options of a benchmark with these models and default numbers of rows; sets torch's threads."""
    arguments = parser(description)
    arguments.add_argument("--models", nargs="+", choices=list(models), default=list(models))
    arguments.add_argument("--rows", nargs="+", type=int, default=list(rows))
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--turns", type=int, default=7)
    options = arguments.parse_args()
    if max(options.rows) > ROWS[-1]:
        arguments.error(f"--rows: at most {ROWS[-1]}")
    torch.set_num_threads(options.threads)
    return options


def measured(cases: Iterator[tuple[str, int, int, Runs]], threads: int, turns: int) -> dict[str, Any]:
    """Milliseconds of each implementation and of reading the weights once, and their ratios, by case.

    Parameters
    ----------
    cases
        Model, number of rows, bytes of weights, and implementations of each case.
    threads
        Threads that read memory.
    turns
        Turns of each case; the best one counts.
    """
    figures: dict[str, Any] = {}
    read, size = read_roof("cpu", threads)
    with torch.inference_mode():
        for model, rows, weights, runs in cases:
            best, rates = dict.fromkeys(runs, float("inf")), [0.0]
            for _ in range(turns):
                began = time.perf_counter()
                read()
                rates.append(size / (time.perf_counter() - began))
                for way, run in runs.items():
                    best[way] = min(best[way], run())
            floor, case = weights / max(rates), f"{model}, {rows} rows"
            figures[f"{case}: ms"] = {way: round(1e3 * one, 2) for way, one in best.items()}
            figures[f"{case}: floor_ms"] = round(1e3 * floor, 2)
            figures[f"{case}: ratio"] = {way: round(one / floor, 2) for way, one in best.items()}
    return figures
