"""The kernel does not clear memory that a forward frees for the next forward, and other tasks get it back."""

from __future__ import annotations

import json
import mmap
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import dask.config
import pytest
from distributed import Client, LocalCluster

from distkv_dask import Engine
from tests._models import model_dir

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such thresholds")

TENSOR = 1 << 20
"""Bytes: less than a huge page."""
FEW, MANY = 0.05, 0.5
"""Shares of a tensor's pages that the kernel clears: few at most, many at least."""
SETTLED = 8
"""Repetitions after which tensors use no new addresses. Aligning tensors cuts off small pieces. glibc keeps seven of
each size, and until it has them a tensor does not fit where one was before."""
KEPT, GIVEN_BACK = 8, 64
"""Tensors at a time. Free memory between blocks in use is reused in any case; it is less than 32 tensors."""

SCRIPT = """
from distkv_dask.worker.heap import give_back_freed_memory, keep_freed_memory
from tests.engine.test_freed_memory import GIVEN_BACK, KEPT, cleared
print([*cleared(GIVEN_BACK)])
assert keep_freed_memory()
print([*cleared(KEPT)])
give_back_freed_memory()
print([*cleared(GIVEN_BACK)])
"""


def cleared(tensors: int) -> tuple[float, float]:
    """Share of the tensors' pages that the kernel clears when they are made again, here and in another thread.

    Lanes are other threads, and memory that they free is in another "arena" of glibc.
    """
    with ThreadPoolExecutor(1) as lane:
        return _cleared(tensors), lane.submit(_cleared, tensors).result()


def _cleared(tensors: int) -> float:
    for _ in range(SETTLED):
        _make(tensors)
    return _faults(lambda: _make(tensors)) / tensors / _faults(_map_as_much)


def _make(tensors: int) -> None:
    import torch

    made = [torch.empty(TENSOR, dtype=torch.uint8) for _ in range(tensors)]
    for tensor in made:
        tensor[:: mmap.PAGESIZE] = 1  # in this thread, unlike torch.ones


def _map_as_much() -> None:
    with mmap.mmap(-1, TENSOR, mmap.MAP_PRIVATE) as mapped:
        for at in range(0, TENSOR, mmap.PAGESIZE):
            mapped[at] = 1


def _faults(do: Callable[[], object]) -> int:
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    do()
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=60)
    before, while_kept, after = (json.loads(line) for line in done.stdout.splitlines())
    assert max(while_kept) < FEW < MANY < min(before + after)


def test_a_worker_keeps_freed_memory_while_an_engine_is_open() -> None:
    """Dask's nannies tell their workers to return it at once, in a variable that only a new process reads."""
    with (
        dask.config.set({"distributed.worker.multiprocessing-method": "spawn"}),
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        (before,) = client.run(cleared, GIVEN_BACK).values()
        with Engine(client, str(model_dir("llama-gqa")), kv_memory="4 MiB"):
            (during,) = client.run(cleared, KEPT).values()
        (after,) = client.run(cleared, GIVEN_BACK).values()
    assert max(during) < FEW < MANY < min(before + after)
