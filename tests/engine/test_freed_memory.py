"""Memory that a forward frees is not cleared by the kernel for the next one, and other tasks get it back."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys

import pytest
from distributed import Client, LocalCluster

from distkv_dask import Engine
from tests._models import model_dir

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such thresholds")

TENSOR = 1 << 20
"""Bytes: less than a huge page."""
FEW, MANY = 0.05, 0.5
"""Of a tensor's pages: how many the kernel clears."""

SCRIPT = """
from distkv_dask.worker.heap import give_back_freed_memory, keep_freed_memory
from tests.engine.test_freed_memory import cleared
print(cleared(), keep_freed_memory(), cleared(), give_back_freed_memory(), cleared())
"""


def cleared() -> float:
    """Which part of a tensor's pages the kernel clears when one is made after another."""
    import torch

    torch.ones(TENSOR, dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(4):
        torch.ones(TENSOR, dtype=torch.uint8)
    faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before
    return faults / 4 / (TENSOR / resource.getpagesize())


def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=60)
    before, kept, while_kept, _, after = done.stdout.split()
    assert kept == "True"
    assert float(while_kept) < FEW < MANY < min(float(before), float(after))


def test_a_worker_keeps_freed_memory_while_an_engine_is_open() -> None:
    """Dask's nannies tell their workers to give it back at once."""
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        (before,) = client.run(cleared).values()
        with Engine(client, str(model_dir("llama-gqa")), kv_memory="4 MiB"):
            (during,) = client.run(cleared).values()
        (after,) = client.run(cleared).values()
    assert during < FEW < MANY < min(before, after)
