"""Several answers to one prompt: sampled as each would be alone, with the prompt's KV stored once."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from distributed import Client, Scheduler, Worker

from distkv_dask import CapacityError, Engine, InvalidRequestError, SamplingParams
from distkv_dask.client.session.branches import branch_samplings
from tests._cluster import engine_test
from tests._models import block_bytes, model_dir, prompt_ids

SMALL: dict[str, Any] = {"dtype": "float32", "block_tokens": 8, "prefill_chunk_tokens": 32, "window_steps": 4}
MODEL = str(model_dir("llama-gqa"))
DRAWN = SamplingParams(max_new_tokens=12, ignore_eos=True, temperature=1.0, seed=7)


def engine_of(client: Client, blocks: int = 40, **settings: Any) -> Engine:
    return Engine(client, MODEL, kv_memory=blocks * block_bytes("llama-gqa"), **(SMALL | settings))


@engine_test(2)
async def test_branches_are_what_each_would_be_alone_and_share_the_prompt(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    prompt, many = prompt_ids(203, seed=1), replace(DRAWN, n=4, logprobs=1)
    async with engine_of(client) as engine:
        done = await engine.submit(prompt, many)
        totals = (await engine.status()).totals
        assert totals["prefilled_tokens"] == 200 + 4 * 3, "whole blocks of the prompt once, its rest for each"
        assert len({one.token_ids for one in done.answers}) == 4
        alone = [await engine.submit(prompt, one) for one in branch_samplings(many)]
        assert [one.token_ids for one in done.answers] == [one.token_ids for one in alone]
        for one, other in zip(done.answers, alone, strict=True):
            assert [each.token_id for each in one.logprobs] == list(one.token_ids)
            assert [each.logprob for each in one.logprobs] == pytest.approx(
                [each.logprob for each in other.logprobs], abs=1e-4
            )
        assert (await engine.submit(prompt, many)).answers[3].token_ids == alone[3].token_ids, "by seed alone"
        assert (await engine.submit(prompt_ids(5), many)).answers[3].token_ids, "a prompt shorter than a block"
        assert all(one.used_blocks == 0 for one in (await engine.status()).workers.values())


@engine_test(2)
async def test_the_best_of_many_are_those_with_the_highest_log_probability_per_token(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    text, question = prompt_ids(60, seed=1), prompt_ids(9, seed=2)
    async with engine_of(client) as engine, await engine.ingest(text) as document:
        best = await document.ask(question, replace(DRAWN, n=2, best_of=5))
        every = await document.ask(question, replace(DRAWN, n=5, logprobs=0))
        assert every.reused_tokens == 56
        means = {one.token_ids: sum(each.logprob for each in one.logprobs) / 12 for one in every.answers}
        ranked = sorted(means, key=means.__getitem__, reverse=True)
        assert [one.token_ids for one in best.answers] == ranked[:2]
        assert best.logprobs is None
        with pytest.raises(InvalidRequestError, match="one answer"):
            engine.stream(question, replace(DRAWN, n=2))
        with pytest.raises(InvalidRequestError, match="one answer"):
            document.chat().ask(question, replace(DRAWN, n=2))


@engine_test(3)
async def test_branches_survive_a_worker_that_is_lost(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
    prompt, many = prompt_ids(400, seed=3), replace(DRAWN, n=3, max_new_tokens=60, logprobs=0)
    async with engine_of(client, 45) as engine:
        expected = [one.token_ids for one in (await engine.submit(prompt, many)).answers]
        running = engine.submit(prompt, many)
        while not any(one.generated_tokens > 1 for one in (await engine.status()).sequences.values()):
            await asyncio.sleep(0.01)
        sequences = (await engine.status()).sequences.values()
        home = next(one.home for one in sequences if one.generated_tokens > 1)
        await next(worker for worker in workers if worker.address == home).close()
        done = await running
        assert [one.token_ids for one in done.answers] == expected
        assert all([each.token_id for each in one.logprobs] == list(one.token_ids) for one in done.answers)


@engine_test(1)
async def test_several_answers_fail_or_are_cancelled_together_and_leave_nothing(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    async with engine_of(client) as engine:
        with pytest.raises(CapacityError):
            await engine.submit(prompt_ids(400), replace(DRAWN, n=2))
        running = engine.submit(prompt_ids(100), replace(DRAWN, n=3, max_new_tokens=100))
        while not any(one.generated_tokens for one in (await engine.status()).sequences.values()):
            await asyncio.sleep(0.01)
        assert running.cancel()
        done = await engine.submit(prompt_ids(20), replace(DRAWN, n=2))
        assert len(done.answers) == 2
        while any(one.used_blocks for one in (await engine.status()).workers.values()):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n": 0}, "n is 0"),
        ({"n": 4, "best_of": 3}, "best_of is 3"),
        ({"n": 2, "temperature": 0}, "temperature 0"),
        ({"n": 2, "choices": ("yes", "no")}, "no n"),
    ],
)
def test_numbers_of_answers_that_make_no_sense_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        SamplingParams(**({"temperature": 1.0} | settings))
