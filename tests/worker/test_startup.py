"""Checks when an engine opens, so that no request is the first to fail."""

from __future__ import annotations

import threading

import pytest
from _cluster import gen_cluster
from distributed import Client, Scheduler, Worker

from distkv_dask.errors import UnsupportedModelError
from distkv_dask.scheduler.gmanager import GManager
from distkv_dask.worker.blocks.pool import BlockShape, Pool
from distkv_dask.worker.startup import check_kernels


@pytest.mark.parametrize(("kv_heads", "head_dim", "heads"), [(2, 12, 4), (2, 20, 4), (3, 16, 4)])
def test_heads_that_kernels_do_not_take_are_refused_when_an_engine_opens(
    kv_heads: int, head_dim: int, heads: int
) -> None:
    pool = Pool(BlockShape(2, kv_heads, head_dim, "float32", 8), 1)
    with pytest.raises(UnsupportedModelError, match="heads that kernels do not take"):
        check_kernels(pool, heads)


@pytest.mark.parametrize(("kv_heads", "head_dim", "heads"), [(2, 8, 4), (1, 100 + 4, 7), (2, 576, 4)])
def test_heads_that_kernels_take_pass(kv_heads: int, head_dim: int, heads: int) -> None:
    check_kernels(Pool(BlockShape(2, kv_heads, head_dim, "bfloat16", 8), 1), heads)


def test_workers_import_what_opening_needs_before_an_engine_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that only hold KV have no model, and import nothing for one."""
    imported = threading.Semaphore(0)
    monkeypatch.setattr("distkv_dask.worker.rmanager.import_ahead", imported.release)
    memory = {"resources": {"distkv-memory": 1}}

    @gen_cluster(client=True, nthreads=[("127.0.0.1", 1), ("127.0.0.1", 1, memory)])
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        await client.register_plugin(GManager())

    run()
    assert imported.acquire(timeout=10)
    assert not imported.acquire(timeout=0.1)
