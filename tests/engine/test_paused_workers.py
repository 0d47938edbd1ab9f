"""Workers that Dask pauses because their memory is full: their work does not wait forever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from distributed import Client, Scheduler, Worker
from distributed.core import Status

from distkv_dask import CapacityError, Engine, SamplingParams
from tests._cluster import engine_test
from tests._models import model_dir, prompt_ids, reference_generate

TINY: dict[str, Any] = {"dtype": "float32", "kv_memory": "2 MiB", "block_tokens": 8, "prefix_cache": False}
NEW = 8
SAMPLING = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
PROMPTS = [prompt_ids(30, seed=seed) for seed in range(4)]


def expected() -> list[list[int]]:
    return [one.tokens for one in reference_generate(model_dir("llama-gqa"), PROMPTS, NEW)]


async def until(is_so: Callable[[], object]) -> None:
    while not is_so():
        await asyncio.sleep(0.01)


async def fill(worker: Worker) -> int | None:
    """Set a worker's memory limit below its use, until Dask pauses it; returns the limit before."""
    before = worker.memory_manager.memory_limit
    worker.memory_manager.memory_limit = psutil.Process().memory_info().rss
    await until(lambda: worker.status == Status.paused)
    return before


async def relieve(worker: Worker, limit: int | None) -> None:
    worker.memory_manager.memory_limit = limit
    await until(lambda: worker.status == Status.running)


@pytest.mark.parametrize("granularity", ["window", "layer"])
def test_prompts_that_were_sent_to_a_paused_worker_are_answered_by_another(granularity: str) -> None:
    @engine_test(workers=2)
    async def run(client: Client, scheduler: Scheduler, a: Worker, b: Worker) -> None:
        settings = TINY | {"granularity": granularity, "timeout_start": 3}
        async with Engine(client, str(model_dir("llama-gqa")), **settings) as engine:
            limit = await fill(a)
            running = [engine.submit(prompt, SAMPLING) for prompt in PROMPTS]  # before the gManager checks again
            done = [await one for one in running]
            assert [list(one.token_ids) for one in done] == expected()
            assert {span.worker for one in done for span in one.placement} == {b.address}
            await relieve(a, limit)
            await until(
                lambda: not scheduler.plugins["distkv"].engines[engine.id].life.ledger.workers[a.address].retiring
            )
            both = await engine.generate(PROMPTS, SAMPLING)
            assert {span.worker for one in both for span in one.placement} == {a.address, b.address}

    run()


@engine_test(workers=1)
async def test_where_all_workers_are_paused_a_request_ends_with_what_to_do_and_later_ones_are_served(
    client: Client, scheduler: Scheduler, worker: Worker
) -> None:
    settings = TINY | {"timeout_start": 1, "timeout_open": 3}
    async with Engine(client, str(model_dir("llama-gqa")), **settings) as engine:
        limit = await fill(worker)
        with pytest.raises(CapacityError, match=r"Dask paused for their memory.*lower kv_memory"):
            await engine.submit(PROMPTS[0], SAMPLING)
        assert not worker.plugins["distkv"].engines[engine.id].runtime.pool.used_blocks
        running = engine.submit(PROMPTS[0], SAMPLING)
        await relieve(worker, limit)
        assert list((await running).token_ids) == expected()[0]
