"""Log probabilities of answers and prompts are those of one process, whatever happens to workers and memory."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from distributed import Client, Scheduler, Worker

from distkv_dask import Completion, Engine, SamplingParams, TokenLogprob, perplexity
from distkv_dask.scheduler.work import chunks
from distkv_dask.worker.model.loaded import LoadedModel
from tests._cluster import engine_test
from tests._models import block_bytes, kv_memory, model_dir, prompt_ids, reference_generate, text_model_dir

NEW = 10
SMALL: dict[str, Any] = {"dtype": "float32", "block_tokens": 8, "prefill_chunk_tokens": 32}
SCORED = SamplingParams(max_new_tokens=NEW, ignore_eos=True, logprobs=3, prompt_logprobs=2)


@cache
def reference(model: str, tokens: tuple[int, ...]) -> torch.Tensor:
    """Log probabilities of every next token, float64 [tokens, vocab], from one forward of plain transformers."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        return plain(torch.tensor([tokens])).logits[0].double().log_softmax(-1)


def check(model: str, prompt: Sequence[int], done: Completion) -> None:
    """Compare a completion of :data:`SCORED` with one process."""
    expected = reference(model, (*prompt, *done.token_ids))
    assert done.logprobs is not None
    assert done.prompt_logprobs is not None
    first, *scored = done.prompt_logprobs
    assert first is None
    assert [one.token_id for one in scored if one is not None] == prompt[1:]
    assert [one.token_id for one in done.logprobs] == list(done.token_ids)
    for at, (one, best) in enumerate([*((one, 2) for one in scored), *((one, 3) for one in done.logprobs)]):
        assert one is not None
        assert one.logprob == pytest.approx(float(expected[at, one.token_id]), abs=1e-4)
        right = expected[at].topk(best)
        assert [token for token, _ in one.best] == right.indices.tolist()
        assert [logprob for _, logprob in one.best] == pytest.approx(right.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("granularity", ["window", "layer"])
@pytest.mark.parametrize("family", ["llama-gqa", "gemma2"])
def test_logprobs_over_three_workers_are_those_of_one_process(
    family: str, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [prompt_ids(length, seed=length) for length in (210, 41, 1)]
    drawn = replace(SCORED, temperature=0.7, seed=5, top_k=40, repetition_penalty=1.2)
    held: list[int] = []
    forward = LoadedModel.forward

    def watched(self: LoadedModel, *arguments: Any) -> torch.Tensor:
        logits = forward(self, *arguments)
        held.append(len(logits))
        return logits

    monkeypatch.setattr(LoadedModel, "forward", watched)
    monkeypatch.setattr(chunks, "SCORED_TOKENS", 12)

    @engine_test(workers=3)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        memory, settings = kv_memory(family, 12), SMALL | {"granularity": granularity}
        async with Engine(client, str(model_dir(family)), kv_memory=memory, **settings) as engine:
            held.clear()
            done = await engine.generate(prompts, [SCORED, drawn, SCORED])
            assert len(done[0].placement) == 3
            for prompt, one in zip(prompts, done, strict=True):
                check(str(model_dir(family)), prompt, one)

    run()
    assert max(held) <= 12, "logits of few rows are there at once"


def test_logprobs_end_with_the_answer_and_are_those_of_the_model_not_of_a_schema() -> None:
    folder = str(text_model_dir(end=True))
    prompt = prompt_ids(30, seed=2)

    @engine_test(workers=1)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with Engine(client, folder, **SMALL) as engine:
            whole = await engine.submit(prompt, SamplingParams(max_new_tokens=40, logprobs=0))
            stop = (whole.text[3:5], whole.text[12:])
            cut = await engine.submit(prompt, SamplingParams(max_new_tokens=40, logprobs=0, stop=stop))
            assert cut.finish_reason == "stop"
            assert [one.token_id for one in cut.logprobs] == list(cut.token_ids)
            assert len(cut.token_ids) < len(whole.token_ids)
            enum = {"enum": ["left", "right"]}
            if_schema = await engine.submit(prompt, SamplingParams(max_new_tokens=20, logprobs=1, schema=enum))
            assert if_schema.finish_reason == "stop"
            expected = reference(folder, (*prompt, *if_schema.token_ids))[len(prompt) - 1 :]
            for row, one in zip(expected, if_schema.logprobs, strict=False):
                assert one.logprob == pytest.approx(float(row[one.token_id]), abs=1e-4)
            assert len(if_schema.logprobs) == len(if_schema.token_ids)
            plain = await engine.submit(prompt, SamplingParams(max_new_tokens=2))
            assert plain.logprobs is None
            assert plain.prompt_logprobs is None

    pytest.importorskip("llguidance", reason="llguidance is not installed (extra: schema)")
    run()


@engine_test(2)
async def test_a_prompt_that_is_scored_shares_nothing_and_others_share_it(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    text, question = prompt_ids(60, seed=1), prompt_ids(9, seed=2)
    model = str(model_dir("llama-gqa"))
    async with Engine(client, model, kv_memory="512 KiB", **SMALL) as engine:
        await engine.submit(text, replace(SCORED, prompt_logprobs=None))
        document = await engine.ingest(text)
        for done in (await engine.submit([*text, *question], SCORED), await document.ask(question, SCORED)):
            assert done.reused_tokens == 0
            check(model, [*text, *question], done)
        assert (await document.ask(question, replace(SCORED, prompt_logprobs=None))).reused_tokens == 56
        await document.release()


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("victim", [0, -1], ids=["holder", "home"])
def test_a_lost_worker_loses_and_repeats_no_logprob(victim: int, phase: str) -> None:
    prompt, new = prompt_ids(400), 120
    (expected,) = reference_generate(model_dir("llama-gqa"), [prompt], new)

    @engine_test(3)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        memory = 45 * block_bytes("llama-gqa")
        async with Engine(client, str(model_dir("llama-gqa")), kv_memory=memory, window_steps=2, **SMALL) as engine:
            running = engine.submit(prompt, replace(SCORED, max_new_tokens=new))
            reached = (lambda one: one.generated_tokens > 1) if phase == "decode" else lambda one: one.kv_tokens > 32
            while not any(map(reached, (await engine.status()).sequences.values())):
                await asyncio.sleep(0.01)
            (one,) = (await engine.status()).sequences.values()
            lost = one.placement[victim].worker
            await next(worker for worker in workers if worker.address == lost).close()
            done = await running
            assert list(done.token_ids) == expected.tokens
            check(str(model_dir("llama-gqa")), prompt, done)
            assert (await engine.status()).totals["repair_events"] == 1

    run()


def test_a_request_that_makes_way_and_one_whose_blocks_move_keep_their_logprobs() -> None:
    prompts = prompt_ids(200, seed=2), prompt_ids(40, seed=3)

    @engine_test(2)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        memory = 20 * block_bytes("llama-gqa")
        async with Engine(client, str(model_dir("llama-gqa")), kv_memory=memory, window_steps=4, **SMALL) as engine:
            first = engine.submit(prompts[0], replace(SCORED, max_new_tokens=100))
            while not any(one.generated_tokens for one in (await engine.status()).sequences.values()):
                await asyncio.sleep(0.01)
            urgent = await engine.submit(prompts[1], replace(SCORED, priority=1))
            check(str(model_dir("llama-gqa")), prompts[1], urgent)
            check(str(model_dir("llama-gqa")), prompts[0], await first)
            assert (await engine.status()).totals["spill_events"] >= 1

    run()


def test_perplexity_is_that_of_the_mean() -> None:
    some = [None, TokenLogprob(1, -0.5), TokenLogprob(2, -1.5)]
    assert perplexity(some) == pytest.approx(2.718281828459045)
    assert perplexity([TokenLogprob(1, float("-inf"))]) == float("inf")
