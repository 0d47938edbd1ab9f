"""One prompt on all workers at once: its tokens are those of plain transformers, whatever happens during it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from distributed import Client, Scheduler, Worker

from distkv_dask import Engine, SamplingParams
from distkv_dask.scheduler.work import replan
from tests._cluster import engine_test
from tests._models import model_dir, prompt_ids, reference_generate

NEW = 12
GREEDY = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
SMALL: dict[str, Any] = {"dtype": "float32", "block_tokens": 8, "prefill_chunk_tokens": 32, "kv_memory": "4 MiB"}


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2-short", "deepseek-v3", "gpt-oss", "lfm2"])
def test_a_prompt_that_all_workers_compute_has_the_tokens_of_one_process(family: str) -> None:
    prompts = [prompt_ids(length, seed=length) for length in (160, 61)]
    expected = reference_generate(model_dir(family), prompts, NEW)
    stays = family in ("gpt-oss", "lfm2")  # windows and states are at homes

    @engine_test(workers=3)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with Engine(client, str(model_dir(family)), prefill_workers=3, **SMALL) as engine:
            for prompt, right in zip(prompts, expected, strict=True):
                done = (await engine.generate([prompt], GREEDY))[0]
                assert list(done.token_ids) == right.tokens
                assert len({span.worker for span in done.placement}) == (1 if stays else 3)
                assert len(done.placement) > 3 or stays or len(prompt) < 100
            status = await engine.status()
            assert status.totals.get("wavefront_events", 0) == (0 if stays else 2)

    run()


@pytest.mark.parametrize("family", ["llama-gqa", "deepseek-v3"])
def test_workers_that_do_nothing_else_help_and_stop_when_others_come(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [prompt_ids(length, seed=length) for length in (400, 300, 310, 280)]
    expected = reference_generate(model_dir(family), prompts, NEW)
    folder = str(model_dir(family))
    monkeypatch.setattr(replan, "LONG", 0.0)  # chunks of 32 tokens
    monkeypatch.setattr(replan, "QUIET", 0.0)

    @engine_test(workers=3)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with Engine(client, folder, performance="preset", prefill_workers="auto", **SMALL) as engine:
            (alone,) = await engine.generate(prompts[:1], GREEDY)
            assert list(alone.token_ids) == expected[0].tokens
            assert len({span.worker for span in alone.placement}) == 3
            running = []
            for prompt in prompts[1:]:
                running.append(engine.submit(prompt, GREEDY))
                await asyncio.sleep(0.05)
            for one, right in zip(running, expected[1:], strict=True):
                assert list((await one).token_ids) == right.tokens
            assert (await engine.status()).totals["wavefront_events"] > 1

    run()
