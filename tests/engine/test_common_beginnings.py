"""Requests that arrive together and begin alike: tokens of plain transformers, and the beginning computed once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from distributed import Client, Scheduler, Worker

from distkv_dask import Completion, Engine, SamplingParams
from distkv_dask.gang import ChunkResult, PrefillChunk
from distkv_dask.worker.runtime import Runtime
from tests._cluster import engine_test
from tests._models import block_bytes, choice_probabilities, model_dir, prompt_ids, reference_generate

BLOCK = 8
SMALL: dict[str, Any] = {
    "dtype": "float32", "block_tokens": BLOCK, "prefill_chunk_tokens": 32, "window_steps": 4, "performance": "preset",
}  # fmt: skip
TWELVE = SamplingParams(max_new_tokens=12, ignore_eos=True)
COMMON = 96
FAMILY = "llama-gqa"


def small(client: Client, blocks: int, **settings: Any) -> Engine:
    """An engine whose workers have room for ``blocks`` blocks each."""
    return Engine(client, str(model_dir(FAMILY)), kv_memory=blocks * block_bytes(FAMILY), **SMALL | settings)


def alike(count: int, common: int = COMMON) -> list[list[int]]:
    """Prompts with a common beginning, and a few different tokens each."""
    return [prompt_ids(common) + prompt_ids(3 + seed % 4, seed=seed) for seed in range(1, count + 1)]


def assert_right(prompts: list[list[int]], done: list[Completion]) -> None:
    expected = reference_generate(model_dir(FAMILY), prompts, 12)
    assert [list(one.token_ids) for one in done] == [one.tokens for one in expected]


async def assert_nothing_left(engine: Engine, *workers: Worker) -> None:
    """Check that no request is left, and that every pool holds just the blocks that the gManager considers cached."""
    for _ in range(300):  # the last releases may still be on their way
        status = await engine.status()
        cached = [status.workers[worker.address].blocks.cached for worker in workers]
        pools = [worker.plugins["distkv"].engines[engine.id].runtime.pool.used_blocks for worker in workers]
        if pools == cached and not status.sequences:
            return
        await asyncio.sleep(0.02)
    assert pools == cached
    assert not status.sequences


@pytest.mark.parametrize("granularity", ["window", "layer"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_batch_computes_what_its_prompts_begin_with_once_for_each_worker(count: int, granularity: str) -> None:
    prompts = alike(6)

    @engine_test(workers=count)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with small(client, 60, granularity=granularity) as engine:
            done = await engine.generate(prompts, TWELVE)
            assert_right(prompts, done)
            computed = (await engine.status()).totals["prefilled_tokens"]
            own = sum(len(prompt) - COMMON for prompt in prompts)
            assert COMMON + own <= computed <= count * COMMON + own
            await assert_nothing_left(engine, *workers)

    run()


@engine_test(workers=2)
async def test_a_beginning_over_several_workers_is_shared_while_the_first_still_decodes(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    first, *others = alike(4, common=200)
    async with small(client, 22) as engine:  # a request fills more than one worker
        long = SamplingParams(max_new_tokens=80, ignore_eos=True)
        running = engine.submit(first, long)
        while not any(one.generated_tokens for one in (await engine.status()).sequences.values()):
            await asyncio.sleep(0.01)
        done = await engine.generate(others, TWELVE)
        assert_right(others, done)
        assert [one.reused_tokens for one in done] == [200] * 3
        assert len({span.worker for span in done[0].placement}) == 2
        (expected,) = reference_generate(model_dir(FAMILY), [first], 80)
        one = await running
        assert list(one.token_ids) == expected.tokens
        assert one.reused_tokens == 0
        await assert_nothing_left(engine, *workers)


@engine_test(workers=3)
async def test_a_home_that_dies_and_a_first_one_that_is_cancelled_change_no_tokens(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    prompts = alike(6, common=200)
    async with small(client, 60) as engine:
        running = [engine.submit(prompt, TWELVE) for prompt in prompts]
        while not any(one.kv_tokens for one in (await engine.status()).sequences.values()):
            await asyncio.sleep(0.005)
        running[0].cancel()
        sequences = (await engine.status()).sequences.values()
        home = next(one.home for one in sequences if one.kv_tokens)
        await next(worker for worker in workers if worker.address == home).close()
        assert_right(prompts[1:], [await one for one in running[1:]])
        await assert_nothing_left(engine, *(worker for worker in workers if worker.address != home))


@engine_test(workers=3)
async def test_choices_over_one_document_are_scored_together_wherever_its_blocks_are(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    text, folder = prompt_ids(216, seed=1), str(model_dir(FAMILY))
    questions = [prompt_ids(4 + at % 3, seed=at) for at in range(6)]
    choices = ((7,), (8,), (9, 3), (9, 4, 5))
    forwards: list[int] = []
    compute = Runtime.prefill_together

    def counted(self: Runtime, chunks: list[PrefillChunk]) -> list[ChunkResult]:
        forwards.append(len(chunks))
        return compute(self, chunks)

    with pytest.MonkeyPatch.context() as patch:
        async with small(client, 20) as engine, await engine.ingest(text) as document:
            assert len({span.worker for span in document.placement}) == 2
            patch.setattr(Runtime, "prefill_together", counted)
            done = await document.ask(questions, [SamplingParams(choices=choices)] * 6)
            for question, one in zip(questions, done, strict=True):
                expected = choice_probabilities(folder, [*text, *question], choices)
                assert list(one.scores.values()) == pytest.approx(expected, abs=1e-4)
                assert one.reused_tokens == 216
            assert sum(forwards) == 6
            assert max(forwards) > 1
        await asyncio.sleep(0)
    assert not any(worker.plugins["distkv"].engines for worker in workers)
