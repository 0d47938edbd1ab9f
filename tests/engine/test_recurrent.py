"""Models with recurrent layers, or windows at homes, on a cluster: tokens of plain transformers, whatever happens."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from distributed import Client, Scheduler, Worker

from distkv_dask import Engine, SamplingParams
from distkv_dask.errors import UnsupportedModelError
from tests._cluster import engine_test
from tests._models import HYBRIDS, WINDOWED, kv_memory, model_dir, prompt_ids, reference_generate
from tests._splits import force_split

NEW = 12
GREEDY = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
SMALL = {"dtype": "float32", "block_tokens": 8, "prefill_chunk_tokens": 32, "window_steps": 4}
DOCUMENT = prompt_ids(100, seed=4)
FAMILIES = [*HYBRIDS, *WINDOWED]
QUESTIONS = [prompt_ids(length, seed=length) for length in (1, 5, 30, 12)]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_on_three_workers_get_the_tokens_of_one_process(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [prompt_ids(length, seed=length) for length in (130, 61, 77, 45)]
    expected = [one.tokens for one in reference_generate(model_dir(family), prompts, NEW)]
    workers = force_split([(1, 24), (2, 16), (0, None)], monkeypatch)

    @engine_test(workers=workers)
    async def run(client: Client, scheduler: Scheduler, *them: Worker) -> None:
        async with Engine(client, str(model_dir(family)), kv_memory="8 MiB", **SMALL) as engine:
            done = await engine.generate(prompts, GREEDY)
            assert [list(one.token_ids) for one in done] == expected
            assert all(len(one.placement) == 3 for one in done)
            status = await engine.status()
            assert status.state_bytes > 0

    run()


@pytest.mark.parametrize("family", FAMILIES)
def test_questions_go_on_from_the_state_at_the_end_of_their_document(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [DOCUMENT + question for question in QUESTIONS]
    expected = [one.tokens for one in reference_generate(model_dir(family), prompts, NEW)]
    workers = force_split([(1, 48), (0, None)], monkeypatch)

    @engine_test(workers=workers)
    async def run(client: Client, scheduler: Scheduler, *them: Worker) -> None:
        async with (
            Engine(client, str(model_dir(family)), kv_memory="8 MiB", **SMALL) as engine,
            await engine.ingest(DOCUMENT) as document,
        ):
            for _ in range(2):
                done = await document.ask(QUESTIONS, GREEDY)
                assert [list(one.token_ids) for one in done] == expected
                assert [one.reused_tokens for one in done] == [96] * 4
            await document.save(tmp_path)
        monkeypatch.undo()
        async with (
            Engine(client, str(model_dir(family)), kv_memory="8 MiB", **SMALL) as engine,
            await engine.load(tmp_path) as document,
        ):
            done = await document.ask(QUESTIONS, GREEDY)
            assert [list(one.token_ids) for one in done] == expected
            assert [one.reused_tokens for one in done] == [96] * 4

    run()


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_and_chats_go_on_from_the_last_snapshot_in_what_they_have_in_common(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, expected = [], []
    for question in QUESTIONS[1:]:
        prompts.append([*(prompts[-1] + expected[-1] if prompts else DOCUMENT), *question])
        expected.append(reference_generate(model_dir(family), [prompts[-1]], NEW)[0].tokens)
    workers = force_split([(1, 24), (0, None)], monkeypatch)

    @engine_test(workers=workers)
    async def run(client: Client, scheduler: Scheduler, *them: Worker) -> None:
        async with Engine(client, str(model_dir(family)), kv_memory="8 MiB", **SMALL) as engine:
            done = [await engine.submit(prompt, GREEDY) for prompt in [*prompts, *prompts]]
            assert [list(one.token_ids) for one in done] == expected * 2
            # chunks end at 24, 56, 88; the second turn leaves the first at 112, and ends a chunk at 144; and so on
            assert [one.reused_tokens for one in done] == [0, 88, 144, 88, 144, 168]
            async with await engine.ingest(DOCUMENT) as document, document.chat() as chat:
                for question, answer in zip(QUESTIONS[1:], expected, strict=True):
                    turn = await chat.ask(question, GREEDY)
                    assert list(turn.token_ids) == answer
                    assert turn.reused_tokens >= 96

    run()


@pytest.mark.parametrize("family", ["qwen3-next", "llama4"])
def test_tasks_by_layer_carry_attention_and_the_home_its_states(family: str) -> None:
    prompts = [prompt_ids(length, seed=length) for length in (70, 9)]
    expected = [one.tokens for one in reference_generate(model_dir(family), prompts, NEW)]

    @engine_test(workers=2)
    async def run(client: Client, scheduler: Scheduler, *them: Worker) -> None:
        settings = SMALL | {"granularity": "layer"}
        async with Engine(client, str(model_dir(family)), kv_memory="8 MiB", **settings) as engine:
            assert [list(one.token_ids) for one in await engine.generate(prompts, GREEDY)] == expected
        with pytest.raises(UnsupportedModelError, match="granularity to window"):
            async with Engine(client, str(model_dir("jamba")), kv_memory="8 MiB", **settings):
                pass

    run()


@pytest.mark.parametrize("family", ["qwen3-next", "gemma2"])
@pytest.mark.parametrize("victim", [0, 1], ids=["home", "holder"])
def test_a_worker_that_leaves_costs_no_token(victim: int, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompt_ids(90, seed=3)
    expected = reference_generate(model_dir(family), [prompt], 200)[0].tokens
    workers = force_split([(1, 24), (0, None)], monkeypatch)

    @engine_test(workers=workers + 1)
    async def run(client: Client, scheduler: Scheduler, *them: Worker) -> None:
        async with Engine(client, str(model_dir(family)), kv_memory="8 MiB", **SMALL) as engine:
            running = engine.submit(prompt, SamplingParams(max_new_tokens=200, ignore_eos=True))
            while not any(one.generated_tokens > 8 for one in (await engine.status()).sequences.values()):
                await asyncio.sleep(0.02)
            monkeypatch.undo()
            await them[victim].close()
            assert list((await running).token_ids) == expected

    run()


@pytest.mark.parametrize(("family", "memory"), [("granite4-h", 400 << 10), ("gpt-oss", kv_memory("gpt-oss", 20))])
def test_a_request_that_makes_way_goes_on_from_where_it_was(family: str, memory: int) -> None:
    prompts = [prompt_ids(length, seed=length) for length in (50, 60)]
    expected = [reference_generate(model_dir(family), [prompt], 60)[0].tokens for prompt in prompts]

    @engine_test(workers=1)
    async def run(client: Client, scheduler: Scheduler, *them: Worker) -> None:
        async with Engine(client, str(model_dir(family)), kv_memory=memory, **SMALL) as engine:
            places = them[0].plugins["distkv"].engines[engine.id].facts.places
            assert places == 1
            patient = engine.submit(prompts[0], SamplingParams(max_new_tokens=60, ignore_eos=True))
            while not any(one.generated_tokens > 8 for one in (await engine.status()).sequences.values()):
                await asyncio.sleep(0.01)
            urgent = engine.submit(prompts[1], SamplingParams(max_new_tokens=60, ignore_eos=True, priority=1))
            assert [list((await one).token_ids) for one in (patient, urgent)] == expected
            totals = (await engine.status()).totals
            assert (totals["spill_events"], totals["restore_events"]) == (1, 1)
            assert totals["prefilled_tokens"] == 110, "nothing was computed twice"

    run()
