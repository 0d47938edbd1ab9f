"""Whatever the model family, the split and the batch, greedy tokens in float32 are those of plain transformers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from distributed import Client, Scheduler, Worker

from distkv_dask import Completion, Engine, ModelError, SamplingParams
from distkv_dask.errors import UnsupportedModelError
from distkv_dask.models.gguf_cache import converted_weights
from distkv_dask.models.source import resolve_model
from tests._cluster import about_the_host, engine_test
from tests._models import FAMILIES, block_bytes, kv_memory, model_dir, prompt_ids, reference_generate
from tests._splits import force_split

NEW = 12
GREEDY = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
SMALL = {"dtype": "float32", "block_tokens": 8, "prefill_chunk_tokens": 32}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_larger_than_two_pools_gets_the_tokens_of_one_process(family: str) -> None:
    prompts = [prompt_ids(length, seed=length) for length in (230, 5, 61)]
    expected = reference_generate(model_dir(family), prompts, NEW)

    @engine_test(workers=3)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        memory = kv_memory(family, 12)  # 96 tokens on each worker
        async with Engine(client, str(model_dir(family)), kv_memory=memory, **SMALL) as engine:
            done = await engine.generate(prompts, GREEDY)
            assert [list(one.token_ids) for one in done] == [one.tokens for one in expected]
            assert len(done[0].placement) == 3

    run()


@pytest.mark.slow
def test_smollm2_over_three_workers_gives_the_tokens_of_one_process() -> None:
    try:
        source = resolve_model("smollm2-135m")
    except ModelError as error:
        pytest.skip(str(error))
    text = topics["with"] + "\n\nIn short, the with statement"
    weights = converted_weights(Path(source.location), "float32")

    @engine_test(workers=3)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with Engine(client, "smollm2-135m", dtype="float32", kv_memory="16 MiB") as engine:  # 320 tokens each
            prompt = engine.tokenizer.encode(text)
            done = await engine.submit(prompt, SamplingParams(max_new_tokens=12, ignore_eos=True))
            assert len(done.placement) == 3
            assert list(done.token_ids) == reference_generate(weights, [prompt], 12)[0].tokens

    run()


SPLITS = {
    "one worker": [(0, None)],
    "one token far away": [(1, 1), (0, None)],
    "a tail of one token": [(0, 107), (1, None)],
    "an empty span": [(1, 40), (2, 0), (0, None)],
    "prompt here, output there": [(0, 100), (1, None)],
    "output crosses a border": [(0, 60), (1, 44), (2, None)],
    "odd thirds": [(2, 33), (1, 35), (0, None)],
    "a worker has two spans": [(1, 24), (0, 32), (1, 16), (0, None)],
    "five workers": [(3, 7), (4, 50), (1, 1), (2, 30), (0, None)],
}


@pytest.mark.parametrize("name", SPLITS)
def test_any_split_gives_the_same_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompt_ids(100, seed=4)
    expected = reference_generate(model_dir("llama-gqa"), [prompt], NEW)[0].tokens
    workers = force_split(SPLITS[name], monkeypatch)

    @engine_test(workers=workers)
    async def run(client: Client, scheduler: Scheduler, *them: Worker) -> None:
        settings = SMALL | {"block_tokens": 1}  # so that spans may end anywhere
        async with Engine(client, str(model_dir("llama-gqa")), kv_memory="4 MiB", **settings) as engine:
            done = await engine.generate([prompt], GREEDY)
            assert list(done[0].token_ids) == expected

    run()


@engine_test(workers=3)
async def test_requests_that_join_while_others_decode_change_nobodys_tokens(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    lengths = [90, 3, 150, 40, 1, 77]
    news = [30, 5, 12, 25, 40, 9]
    prompts = [prompt_ids(length, seed=length) for length in lengths]
    expected = [
        reference_generate(model_dir("qwen3"), [prompt], new)[0].tokens
        for prompt, new in zip(prompts, news, strict=True)
    ]
    memory = 20 * block_bytes("qwen3")
    async with Engine(client, str(model_dir("qwen3")), kv_memory=memory, window_steps=4, **SMALL) as engine:
        running = []
        for prompt, new in zip(prompts, news, strict=True):
            running.append(engine.submit(prompt, SamplingParams(max_new_tokens=new, ignore_eos=True)))
            await asyncio.sleep(0.05)
        done: list[Completion] = [await one for one in running]
        assert [list(one.token_ids) for one in done] == expected


@engine_test(workers=2)
async def test_sampling_is_the_same_alone_and_in_company(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    prompt = prompt_ids(50)
    params = [SamplingParams(max_new_tokens=20, temperature=0.8, top_p=0.9, seed=seed) for seed in range(4)]
    params.append(SamplingParams(max_new_tokens=20, repetition_penalty=1.3, ignore_eos=True))
    async with Engine(client, str(model_dir("llama-gqa")), kv_memory="4 MiB", **SMALL) as engine:
        together = await engine.generate([prompt] * 5, params)
        alone = [(await engine.generate([prompt], one))[0] for one in params]
        assert [one.token_ids for one in together] == [one.token_ids for one in alone]
        assert len({one.token_ids for one in together}) == 5


@about_the_host("distkv.deterministic is refused on cards")
@engine_test(workers=2)
async def test_deterministic_engines_draw_the_same_alone_in_company_split_and_after_they_made_way(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    prompt, model = prompt_ids(50), str(model_dir("llama-gqa"))
    drawn = SamplingParams(max_new_tokens=20, temperature=1, seed=3, ignore_eos=True)
    settings = {**SMALL, "deterministic": True, "prefix_cache": False}
    with pytest.raises(UnsupportedModelError, match="deterministic"):
        await Engine(client, str(model_dir("mixtral")), kv_memory="4 MiB", **settings)
    async with Engine(client, model, kv_memory="4 MiB", **settings) as engine:
        alone = await engine.submit(prompt, drawn)
        company = [prompt_ids(length, seed=length) for length in (90, 3, 150, 40, 1, 77)]
        together = await engine.generate([*company, prompt], drawn)
    memory = 6 * block_bytes("llama-gqa")
    async with Engine(client, model, kv_memory=memory, window_steps=2, spill=0, **settings) as engine:
        waiting = engine.submit(prompt, drawn)
        urgent = engine.submit(prompt_ids(60, 1), SamplingParams(max_new_tokens=20, ignore_eos=True, priority=1))
        split = await waiting
        await urgent
    assert len({span.worker for span in split.placement}) == 2
    assert alone.token_ids == together[-1].token_ids == split.token_ids
