"""Workers that close by themselves during requests: a loss like any other, repeated elsewhere."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from distributed import Client, LocalCluster, Scheduler, Worker

from distkv_dask import Engine, SamplingParams
from tests._cluster import PROTOCOL, engine_test
from tests._models import model_dir, prompt_ids, reference_generate

TINY: dict[str, Any] = {"dtype": "float32", "kv_memory": "2 MiB", "block_tokens": 8, "window_steps": 2}
NEW = 120
SAMPLING = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
PROMPTS = [prompt_ids(30, seed=seed) for seed in range(6)]


def expected() -> list[list[int]]:
    return [one.tokens for one in reference_generate(model_dir("llama-gqa"), PROMPTS, NEW)]


async def decoding(engine: Engine) -> None:
    """Wait until every worker decodes."""
    while True:
        status = await engine.status()
        homes = {one.home for one in status.sequences.values() if one.generated_tokens > 1}
        if homes == {*status.workers}:
            return
        await asyncio.sleep(0.01)


async def end(worker: Worker, engine: str, how: str) -> None:
    """End a worker, or only a part of it that ends first when a worker leaves."""
    rmanager = worker.plugins["distkv"]
    match how:
        case "close":
            await worker.close()
        case "plugin":
            await worker.plugin_remove("distkv")
        case "runtime":
            await asyncio.to_thread(rmanager.engines[engine].close)
        case "lanes":
            await asyncio.to_thread(rmanager.lanes.home.close)


@pytest.mark.parametrize("how", ["close", "plugin", "runtime", "lanes"])
def test_requests_on_a_worker_that_closes_end_elsewhere(how: str) -> None:
    @engine_test(workers=2)
    async def run(client: Client, scheduler: Scheduler, a: Worker, b: Worker) -> None:
        async with Engine(client, str(model_dir("llama-gqa")), **TINY) as engine:
            running = [engine.submit(prompt, SAMPLING) for prompt in PROMPTS]
            await decoding(engine)
            await end(a, engine.id, how)
            assert [list((await one).token_ids) for one in running] == expected()
            assert list((await engine.status()).workers) == [b.address]
            if how != "close":
                await a.close()

    run()


@pytest.mark.slow
def test_requests_on_workers_that_are_restarted_end_elsewhere() -> None:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, protocol=PROTOCOL, dashboard_address=None) as cluster,
        Client(cluster) as client,
        Engine(client, str(model_dir("llama-gqa")), **TINY) as engine,
    ):
        for _ in range(2):
            running = [engine.submit(prompt, SAMPLING) for prompt in PROMPTS]
            while not any(one.generated_tokens > 1 for one in engine.status().sequences.values()):
                time.sleep(0.02)  # each status costs the scheduler as much as a step
            client.restart_workers([next(iter(engine.status().workers))])
            assert [list(one.result(120).token_ids) for one in running] == expected()
