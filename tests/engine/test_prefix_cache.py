"""Requests that begin like earlier ones have the tokens of plain transformers, whatever was reused."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from distributed import Client, Scheduler, Worker

from distkv_dask import Engine, SamplingParams
from distkv_dask.completion import Completion
from tests._cluster import engine_test
from tests._models import block_bytes, model_dir, prompt_ids, reference_generate

BLOCK = 8
SMALL: dict[str, Any] = {"dtype": "float32", "block_tokens": BLOCK, "prefill_chunk_tokens": 32}
TWELVE = SamplingParams(max_new_tokens=12, ignore_eos=True)


def small(client: Client, blocks: int, **settings: Any) -> Engine:
    """An engine whose workers have room for ``blocks`` blocks each."""
    return Engine(client, str(model_dir("llama-gqa")), kv_memory=blocks * block_bytes("llama-gqa"), **SMALL | settings)


def right(prompt: list[int], done: Completion) -> bool:
    (expected,) = reference_generate(model_dir("llama-gqa"), [prompt], 12)
    return list(done.token_ids) == expected.tokens


async def assert_pools_agree(engine: Engine, *workers: Worker) -> None:
    """Check that no request is left, and that every pool holds just the blocks that the gManager considers cached."""
    for _ in range(200):  # the last releases may still be on their way
        status = await engine.status()
        cached = [status.workers[worker.address].blocks.cached for worker in workers]
        pools = [worker.plugins["distkv"].engines[engine.id].runtime.pool.used_blocks for worker in workers]
        if pools == cached and not status.sequences:
            break
        await asyncio.sleep(0.02)
    assert pools == cached
    assert not status.sequences


@pytest.mark.parametrize("granularity", ["window", "layer"])
def test_prompts_that_begin_alike_compute_only_what_differs(granularity: str) -> None:
    @engine_test(workers=2)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        long = prompt_ids(100)
        async with small(client, 40, granularity=granularity) as engine:
            for prompt, reused in (
                (long, 0),
                (long, 96),
                (long[:50] + prompt_ids(40, seed=1), 48),
                (long[:50] + prompt_ids(40, seed=1) + prompt_ids(9, seed=2), 88),
                (prompt_ids(60, seed=3), 0),
            ):
                (done,) = await engine.generate([prompt], TWELVE)
                assert right(prompt, done)
                assert done.reused_tokens == reused
            await assert_pools_agree(engine, *workers)

    run()


@pytest.mark.parametrize("granularity", ["window", "layer"])
def test_turns_of_a_chat_over_several_workers_reuse_the_turns_before(granularity: str) -> None:
    @engine_test(workers=3)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with small(client, 12, granularity=granularity) as engine:  # each turn fills more than one of them
            prompt, before = prompt_ids(110), 0
            for turn in range(3):
                (done,) = await engine.generate([prompt], TWELVE)
                assert right(prompt, done)
                assert done.reused_tokens == before // BLOCK * BLOCK
                assert len({span.worker for span in done.placement}) > 1
                before = len(prompt) + 11  # the last token has no KV
                prompt = [*prompt, *done.token_ids, *prompt_ids(20, seed=turn + 1)]
            await assert_pools_agree(engine, *workers)

    run()


@engine_test(workers=2)
async def test_many_requests_at_once_share_a_beginning_and_none_waits_for_what_is_cached(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    long = prompt_ids(100)
    async with small(client, 24) as engine:
        await engine.generate([long], TWELVE)
        prompts = [long[:96] + prompt_ids(10, seed=seed) for seed in range(1, 6)]
        done = await engine.generate(prompts, TWELVE)
        assert all(right(prompt, one) for prompt, one in zip(prompts, done, strict=True))
        assert max(one.reused_tokens for one in done) == 96
        others = [prompt_ids(200, seed=seed) for seed in range(10, 13)]  # each needs more than one worker
        done = await engine.generate(others, TWELVE)
        assert all(right(prompt, one) for prompt, one in zip(others, done, strict=True))
        await assert_pools_agree(engine, *workers)


@engine_test(workers=1)
async def test_without_the_cache_nothing_is_kept(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
    async with small(client, 40, prefix_cache=False) as engine:
        for _ in range(2):
            (done,) = await engine.generate([prompt_ids(50)], TWELVE)
            assert done.reused_tokens == 0
        await assert_pools_agree(engine, *workers)
        assert not any(one.blocks.cached for one in (await engine.status()).workers.values())


@engine_test(workers=2)
async def test_a_worker_that_dies_takes_its_cached_blocks_along(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    prompt = prompt_ids(140)
    async with small(client, 40) as engine:
        (first,) = await engine.generate([prompt], TWELVE)
        (home,) = {span.worker for span in first.placement}
        there = {worker.address: worker for worker in workers}
        await there[home].close()
        while len((await engine.status()).workers) > 1:
            await asyncio.sleep(0.02)
        (done,) = await engine.generate([prompt], TWELVE)
        assert right(prompt, done)
        assert done.reused_tokens == 0
        (again,) = await engine.generate([prompt], TWELVE)
        assert right(prompt, again)
        assert again.reused_tokens == 136
