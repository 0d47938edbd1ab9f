"""Embeddings are those of one process over all tokens, whatever happens to workers, memory and prefixes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from distributed import Client, Scheduler, Worker

from distkv_dask import Completion, Engine, SamplingParams
from distkv_dask.errors import InvalidRequestError
from tests._cluster import engine_test
from tests._embeddings import check
from tests._models import block_bytes, kv_memory, model_dir, prompt_ids, reference_generate

SMALL: dict[str, Any] = {"dtype": "float32", "block_tokens": 8, "prefill_chunk_tokens": 32}
MEAN, LAST = SamplingParams(embed="mean"), SamplingParams(embed="last")
LLAMA = str(model_dir("llama-gqa"))


def check_both(model: str, prompt: list[int], mean: Completion, last: Completion) -> None:
    for pooling, done in (("mean", mean), ("last", last)):
        assert (done.text, done.token_ids, done.finish_reason) == ("", (), "stop")
        assert done.prompt_tokens == len(prompt)
        check(model, prompt, pooling, done.embedding)


@pytest.mark.parametrize("granularity", ["window", "layer"])
@pytest.mark.parametrize("family", ["llama-gqa", "gemma2", "deepseek-v3"])
def test_embeddings_over_three_workers_are_those_of_one_process(family: str, granularity: str) -> None:
    prompts = [prompt_ids(length, seed=length) for length in (210, 41, 1)]

    @engine_test(workers=3)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        memory, settings = kv_memory(family, 12), SMALL | {"granularity": granularity}
        async with Engine(client, str(model_dir(family)), kv_memory=memory, **settings) as engine:
            for prompt in prompts:
                done = await engine.generate([prompt, prompt], [MEAN, LAST])
                check_both(str(model_dir(family)), prompt, *done)
                if len(prompt) > 200:
                    assert len(done[0].placement) == 3
                assert done[0].reused_tokens == 0

    run()


@pytest.mark.parametrize("family", ["lfm2", "gpt-oss"])
def test_models_with_states_and_windows_have_embeddings(family: str) -> None:
    prompts = [prompt_ids(length, seed=length) for length in (130, 33, 7)]

    @engine_test(workers=2)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with Engine(client, str(model_dir(family)), kv_memory="4 MiB", **SMALL) as engine:
            means, lasts = [await engine.generate(prompts, one) for one in (MEAN, LAST)]
            for prompt, mean, last in zip(prompts, means, lasts, strict=True):
                check_both(str(model_dir(family)), prompt, mean, last)

    run()


def test_short_texts_share_forwards_with_answers_and_each_keeps_its_own(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"

    @engine_test(2)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        prompts = [prompt_ids(3 + at, seed=at) for at in range(9)]
        (right,) = reference_generate(LLAMA, [prompts[0]], 6)
        async with Engine(client, LLAMA, kv_memory="1 MiB", trace=str(trace), **SMALL) as engine:
            answer = engine.submit(prompts[0], SamplingParams(max_new_tokens=6, ignore_eos=True))
            means, lasts = [engine.generate(prompts, one) for one in (MEAN, LAST)]
            for prompt, mean, last in zip(prompts, await means, await lasts, strict=True):
                check_both(LLAMA, prompt, mean, last)
            assert list((await answer).token_ids) == right.tokens
            assert (await answer).embedding is None
            text = prompt_ids(50, seed=5)
            (unit,) = await engine.generate([text], SamplingParams(embed="mean", normalize=True))
            (plain,) = await engine.generate([text], MEAN)
            assert np.linalg.norm(unit.embedding) == pytest.approx(1, abs=1e-6)
            assert unit.embedding == pytest.approx(plain.embedding / np.linalg.norm(plain.embedding), abs=1e-6)

    run()


@engine_test(2)
async def test_a_mean_covers_what_others_have_computed_and_the_last_token_reuses_it(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    text, question = prompt_ids(64, seed=1), prompt_ids(9, seed=2)
    async with Engine(client, LLAMA, kv_memory="512 KiB", **SMALL) as engine:
        await engine.submit(text, SamplingParams(max_new_tokens=2))
        for prompt in (text, [*text, *question]):
            mean, last = await engine.generate([prompt], MEAN), await engine.generate([prompt], LAST)
            check_both(LLAMA, prompt, mean[0], last[0])
            assert mean[0].reused_tokens == 0
            assert last[0].reused_tokens >= 56
        again = await engine.submit([*text, *question, 3], SamplingParams(max_new_tokens=2))
        assert again.reused_tokens == 72, "a text that was embedded is a prefix of others"
        document = await engine.ingest(text)
        mean, last = await document.ask(question, MEAN), await document.ask(question, LAST)
        check_both(LLAMA, [*text, *question], mean, last)
        assert (mean.reused_tokens, last.reused_tokens) == (0, 64)
        with pytest.raises(InvalidRequestError, match="leave out embed"):
            await document.chat().ask(question, MEAN)
        with pytest.raises(InvalidRequestError, match="leave out embed"):
            document.stream(question, MEAN)
        await document.release()


@pytest.mark.parametrize("embed", ["mean", "last"])
@pytest.mark.parametrize("victim", [0, -1], ids=["holder", "home"])
def test_a_lost_worker_neither_loses_nor_repeats_a_part(victim: int, embed: str) -> None:
    prompt = prompt_ids(400)

    @engine_test(3)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        memory = 40 * block_bytes("llama-gqa")
        async with Engine(client, LLAMA, kv_memory=memory, **SMALL) as engine:
            running = engine.submit(prompt, SamplingParams(embed=embed))  # type: ignore[arg-type]
            while not any(one.kv_tokens > 64 for one in (await engine.status()).sequences.values()):
                await asyncio.sleep(0.002)
            (one,) = (await engine.status()).sequences.values()
            assert one.kv_tokens < 380
            lost = one.placement[victim].worker
            await next(worker for worker in workers if worker.address == lost).close()
            check(LLAMA, prompt, embed, (await running).embedding)
            assert (await engine.status()).totals["repair_events"] == 1

    run()


@pytest.mark.parametrize("family", ["llama-gqa", "deepseek-v3"])
def test_a_text_that_all_workers_compute_at_once_has_the_embedding_of_one_process(family: str) -> None:
    prompts = [prompt_ids(length, seed=length) for length in (160, 61)]

    @engine_test(workers=3)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        settings = SMALL | {"kv_memory": "4 MiB", "prefill_workers": 3}
        async with Engine(client, str(model_dir(family)), **settings) as engine:
            for prompt in prompts:
                (mean,), (last,) = await engine.generate([prompt], MEAN), await engine.generate([prompt], LAST)
                check_both(str(model_dir(family)), prompt, mean, last)
            assert (await engine.status()).totals["wavefront_events"] >= 2

    run()


def test_a_text_that_waits_for_room_and_one_that_takes_it_from_others_are_embedded() -> None:
    texts = prompt_ids(200, seed=2), prompt_ids(150, seed=3)
    (right,) = reference_generate(LLAMA, [texts[0]], 60)

    @engine_test(2)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        memory = 20 * block_bytes("llama-gqa")
        async with Engine(client, LLAMA, kv_memory=memory, window_steps=4, **SMALL) as engine:
            first = engine.submit(texts[0], SamplingParams(max_new_tokens=60, ignore_eos=True))
            while not any(one.generated_tokens for one in (await engine.status()).sequences.values()):
                await asyncio.sleep(0.01)
            later = engine.submit(texts[1], LAST)
            urgent = await engine.submit(texts[1], SamplingParams(embed="mean", priority=1))
            check(LLAMA, texts[1], "mean", urgent.embedding)
            assert list((await first).token_ids) == right.tokens
            check(LLAMA, texts[1], "last", (await later).embedding)
            assert (await engine.status()).totals["spill_events"] >= 1

    run()


@engine_test(3)
async def test_a_model_in_stages_and_one_whose_layers_are_on_disk_have_the_same_embeddings(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    prompts = [prompt_ids(length, seed=length) for length in (120, 19)]
    for more in ({"stages": 3}, {"weights": "disk"}):
        async with Engine(client, LLAMA, kv_memory="2 MiB", **SMALL, **more) as engine:
            means, lasts = [await engine.generate(prompts, one) for one in (MEAN, LAST)]
            for prompt, mean, last in zip(prompts, means, lasts, strict=True):
                check_both(LLAMA, prompt, mean, last)


@engine_test(3)
async def test_texts_that_go_through_stages_in_parts_are_embedded_whole_beside_answers(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    prompts = [prompt_ids(length, seed=length) for length in (410, 230, 70, 9, 33, 129, 64, 65)]
    answer = SamplingParams(max_new_tokens=6, ignore_eos=True)
    right = reference_generate(LLAMA, prompts, 6)
    settings = SMALL | {"kv_memory": "4 MiB", "prefill_chunk_tokens": 300, "stages": 3, "prefix_cache": False}
    async with Engine(client, LLAMA, **settings) as engine:
        means, lasts, answers = await asyncio.gather(*(engine.generate(prompts, one) for one in (MEAN, LAST, answer)))
    for prompt, mean, last, answered, expected in zip(prompts, means, lasts, answers, right, strict=True):
        check_both(LLAMA, prompt, mean, last)
        assert list(answered.token_ids) == expected.tokens


@engine_test(1)
async def test_a_text_as_long_as_the_window_is_embedded_and_a_longer_one_refused(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    async with Engine(client, LLAMA, kv_memory="16 MiB", **SMALL) as engine:
        window = int(engine.facts.max_positions)
        text = prompt_ids(window, seed=4)
        check(LLAMA, text, "last", (await engine.submit(text, LAST)).embedding)
        with pytest.raises(InvalidRequestError, match=r"shorten the prompt$"):
            engine.submit([*text, 1], LAST)
        with pytest.raises(InvalidRequestError, match="empty"):
            engine.submit([], MEAN)


def test_a_text_is_embedded_with_its_adapter_beside_others_without() -> None:
    peft = pytest.importorskip("peft")
    from tests._adapters import adapter_dir

    folder, prompt = adapter_dir("llama-gqa"), prompt_ids(90, seed=8)
    plain = transformers.AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float64)
    adapted = peft.PeftModel.from_pretrained(plain, folder).merge_and_unload().eval()
    with torch.no_grad():
        right = adapted.model(torch.tensor([prompt])).last_hidden_state[0].mean(0).numpy()

    @engine_test(2)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with Engine(client, LLAMA, kv_memory="1 MiB", **SMALL) as engine:
            both = await engine.generate([prompt, prompt], [MEAN, SamplingParams(embed="mean", adapter=folder)])
            check(LLAMA, prompt, "mean", both[0].embedding)
            assert both[1].embedding == pytest.approx(right, abs=1e-5 * float(np.abs(right).max()))
            alone = await engine.embed(prompt, adapter=folder)
            assert alone == pytest.approx(both[1].embedding, abs=1e-5)

    run()
