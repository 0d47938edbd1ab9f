"""In-process Dask clusters for tests: the only module, besides ``conftest.py``, that uses ``distributed.utils_test``.

That module is not a stable API of Dask; if it changes, only these two files have to be adapted.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import dask.config
import pytest
from distributed import Client, LocalCluster, Scheduler, Worker
from distributed.utils_test import gen_cluster, reset_config

from distkv_dask import Engine, EngineStatus, SequenceStatus

__all__ = [
    "ON_CARD",
    "PROTOCOL",
    "SLOW",
    "about_the_host",
    "assert_clean",
    "client_of_all",
    "decoding",
    "engine_test",
    "gen_cluster",
    "reset_config",
    "until_idle",
    "when_idle",
]


ON_CARD = os.environ.get("DISTKV_TEST_DEVICE", "cpu") != "cpu"
"""Whether workers compute on a card, real or emulated."""


def about_the_host(reason: str) -> pytest.MarkDecorator:
    """Mark a test that says nothing about cards, with the reason."""
    return pytest.mark.skipif(ON_CARD, reason=reason)


Test = Callable[..., Awaitable[None]]
OURS = ("prefill-", "decode-", "attend-", "layer-")
"""Prefixes of the keys of our tasks."""
SLOW = os.environ.get("DISTKV_TEST_DEVICE") == "emulated"
"""Whether workers compute on an emulated card, on which a step takes ten times as long as on the CPU."""
PROTOCOL = "ucx" if dask.config.get("distkv.channel", None) == "ucx" else None
"""Protocol of test clusters: UCX if all engines use it (``make test CHANNEL=ucx``), otherwise Dask's default."""


def engine_test(
    workers: int = 3, timeout: float = 120, memory: int = 0, own_kv: Sequence[int] = (), **options: Any
) -> Callable[[Test], Callable[[], None]]:
    """Run ``test(client, scheduler, *workers)`` on an in-process cluster, and check that it leaves nothing behind.

    ``memory`` workers without a model come last. The first ones have ``own_kv`` bytes of KV memory each.
    """

    def decorate(test: Test) -> Callable[[], None]:
        resources: list[dict[str, float]] = [{}] * workers + [{"distkv-memory": 1}] * memory
        for at, size in enumerate(own_kv):
            resources[at] = resources[at] | {"distkv-kv-memory": size}
        nthreads: list[Any] = [("127.0.0.1", 1, {"resources": one} if one else {}) for one in resources]

        speaks = {} if PROTOCOL is None else {"scheduler_kwargs": {"protocol": PROTOCOL}}

        @gen_cluster(client=True, nthreads=nthreads, timeout=timeout * (1 + 4 * SLOW), **speaks, **options)
        async def run(client: Client, scheduler: Scheduler, *them: Worker) -> None:
            await test(client, scheduler, *them)
            await assert_clean(scheduler, *them)

        run.__name__ = test.__name__
        run.__doc__ = test.__doc__
        return run

    return decorate


async def assert_clean(scheduler: Scheduler, *workers: Worker) -> None:
    """Check that no engines, tasks, blocks, channels or lanes are left once work in progress has ended.

    A call may end before the work that it started: a worker whose engine was refused closes its lanes afterwards.
    """
    for _ in range(600):
        if not (left := _left(scheduler, workers)):
            return
        await asyncio.sleep(0.05)
    pytest.fail(f"left behind: {left}")


def _left(scheduler: Scheduler, workers: Sequence[Worker]) -> list[object]:
    manager = scheduler.plugins["distkv"]
    left: list[object] = [key for key in scheduler.tasks if str(key).startswith(OURS)]
    left += [*manager.engines, *manager.dispatcher.submitter._tasks]
    for worker in workers:
        if worker.address in scheduler.workers:  # otherwise it was retired, and its plugin removed
            plugin = worker.plugins["distkv"]
            left += [*plugin.engines, *([plugin.lanes] if plugin.lanes is not None else [])]
    return left + [thread for thread in threading.enumerate() if thread.name.startswith("distkv-")]


@contextmanager
def client_of_all(cluster: LocalCluster) -> Iterator[Client]:
    """A client, once all worker processes of a cluster are running, whatever the previous test did to them."""
    with Client(cluster) as client:
        client.wait_for_workers(len(cluster.worker_spec), timeout=60)
        yield client


def decoding(engine: Engine, seconds: float = 60 * (1 + 4 * SLOW)) -> Mapping[int, SequenceStatus]:
    """Wait until every sequence of an engine is decoding, and return them."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        sequences = engine.status().sequences
        if sequences and all(one.generated_tokens > 1 for one in sequences.values()):
            return sequences
        time.sleep(0.05)
    raise AssertionError(f"nothing decodes: {engine!r} {engine.status()}")


async def until_idle(engine: Engine) -> EngineStatus:
    """The status of an engine once it has no running requests.

    An answer may arrive, and a call to cancel return, before the last worker reports that it has finished a request:
    until then its status is ``retiring``.
    """
    for _ in range(600):
        status = await engine.status()
        if not status.sequences:
            return status
        await asyncio.sleep(0.05)
    raise AssertionError(f"still under way: {status.sequences}")


def when_idle(engine: Engine) -> EngineStatus:
    """The same, for an engine that is not used from a coroutine."""
    for _ in range(600):
        status = engine.status()
        if not status.sequences:
            return status
        time.sleep(0.05)
    raise AssertionError(f"still under way: {status.sequences}")
