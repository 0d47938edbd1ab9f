"""Best times of calls that take turns, and the rate at which this machine reads memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from distkv_dask.kernels import advise_huge_pages, native_kernel

SECONDS = 1.5
"""Seconds after which a call is no longer repeated; it always runs three times."""


def best_seconds(runs: dict[str, Callable[[], object]], device: str) -> dict[str, float]:
    """Best time of each callable; they take turns until every one has had its share of time."""
    best = dict.fromkeys(runs, math.inf)
    spent = dict.fromkeys(runs, 0.0)
    for repetition in range(40):
        for name, run in runs.items():
            if repetition > 2 and spent[name] > SECONDS:
                continue
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            best[name] = min(best[name], seconds)
            spent[name] += seconds
    return best


def read_roof(device: str, threads: int) -> tuple[Callable[[], object], int]:
    """Return a callable that reads memory as fast as this machine can, and how many bytes it reads."""
    memory = torch.empty(1 << 27, dtype=torch.int64, device=device)
    advise_huge_pages(memory)
    memory.fill_(1)
    size = memory.numel() * 8
    if device == "cpu" and native_kernel.missing() is None:
        return lambda: native_kernel.read_memory(memory, threads), size
    return lambda: memory.sum(), size
