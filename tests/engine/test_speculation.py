"""Speculation with right and wrong tokens does not change answers, whatever happens to sequences and workers."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from distributed import Client, Scheduler, Worker

from distkv_dask import Completion, Engine, SamplingParams
from distkv_dask.worker.speculation.gate import Budget, StepSeconds
from distkv_dask.worker.speculation.proposer import Proposer
from tests._cluster import engine_test
from tests._models import block_bytes, model_dir, prompt_ids, reference_generate
from tests._splits import move_at_random

NEW = 40
GREEDY = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
SMALL: dict[str, Any] = {"dtype": "float32", "block_tokens": 8, "prefill_chunk_tokens": 32, "speculation": 8}
PROMPTS = [prompt_ids(length, seed=length) for length in (150, 61, 97, 30)]


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, ...], Sequence[int]]:
    """Answers by prompt, of which every step proposes tokens: in turns all, none, or only the first ones are right."""
    known: dict[tuple[int, ...], Sequence[int]] = {}
    wrong = itertools.cycle((8, 0, 3, 1, 8))

    def propose(proposer: Proposer, most: int) -> tuple[list[int], int]:
        told, at = proposer.text, len(proposer.answer)
        right = known.get(tuple(told[: len(told) - at].tolist()), ())
        tokens = list(right[at : at + most])
        if (place := next(wrong)) < len(tokens):
            tokens[place] = (tokens[place] + 1) % 100
        return tokens, 2

    def learn(seconds: StepSeconds, *_: Any) -> None:
        seconds.plain = 1.0

    monkeypatch.setattr(Proposer, "propose", propose)
    monkeypatch.setattr(StepSeconds, "is_known", True)
    monkeypatch.setattr(StepSeconds, "added", lambda _: (0.0, 0.0))
    monkeypatch.setattr(StepSeconds, "learn", learn)
    monkeypatch.setattr(Budget, "allows", True)
    return known


def expect(oracle: dict[tuple[int, ...], Sequence[int]], prompts: Sequence[Sequence[int]], new: int = NEW) -> Any:
    """Answers of plain transformers, which the oracle proposes from now on."""
    right = [one.tokens for one in reference_generate(model_dir("llama-gqa"), prompts, new)]
    oracle.update(zip(map(tuple, prompts), right, strict=True))
    return right


def told(done: Sequence[Completion]) -> list[list[int]]:
    return [list(one.token_ids) for one in done]


def engine_of(client: Client, blocks: int = 40, **settings: Any) -> Engine:
    return Engine(
        client, str(model_dir("llama-gqa")), kv_memory=blocks * block_bytes("llama-gqa"), **(SMALL | settings)
    )


@pytest.mark.parametrize("granularity", ["window", "layer"])
def test_blocks_move_while_their_sequences_try_tokens(
    granularity: str, oracle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = NEW if granularity == "window" else 12
    expected = expect(oracle, PROMPTS, new)
    move_at_random(monkeypatch, 0)

    @engine_test(3)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with engine_of(client, window_steps=2, granularity=granularity) as engine:
            done = await engine.generate(PROMPTS, replace(GREEDY, max_new_tokens=new))
            assert told(done) == expected
            status = await engine.status()
            assert status.totals["moved_blocks"]
            assert status.speculation == "8"
            assert status.totals["accepted_tokens"] == sum(one.timings.accepted_tokens for one in done) > 0
            assert status.totals["proposed_tokens"] == sum(one.timings.proposed_tokens for one in done)
            assert all(one.timings.proposed_tokens >= one.timings.accepted_tokens for one in done)

    run()


def test_questions_on_a_document_over_three_workers_are_streamed_and_stop_where_they_would(oracle: Any) -> None:
    questions = [prompt_ids(9, seed=at) for at in range(3)]
    expected = expect(oracle, [PROMPTS[0] + one for one in questions])

    @engine_test(3)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with engine_of(client, 16) as engine, await engine.ingest(PROMPTS[0]) as document:
            done = await document.ask(questions, GREEDY)
            assert told(done) == expected
            assert all(one.reused_tokens for one in done)
            short = await document.ask(questions[0], replace(GREEDY, max_new_tokens=5))
            assert (told([short]), short.finish_reason) == ([expected[0][:5]], "length")

    run()


def test_what_is_drawn_is_drawn_without_speculation_too(oracle: Any) -> None:
    drawn = SamplingParams(max_new_tokens=NEW, ignore_eos=True, temperature=1.2, top_k=20, seed=3)
    every = [drawn, replace(drawn, repetition_penalty=1.3), replace(drawn, seed=4), drawn]

    @engine_test(2)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with engine_of(client, speculation="off") as engine:
            plain = await engine.generate(PROMPTS, every)
            assert (await engine.status()).totals["proposed_tokens"] == 0
        oracle.update({tuple(prompt): one.token_ids for prompt, one in zip(PROMPTS, plain, strict=True)})
        async with engine_of(client) as engine:
            done = await engine.generate(PROMPTS, every)
            assert told(done) == told(plain)
            assert all(one.timings.accepted_tokens for one in done)

    run()


@pytest.mark.parametrize("victim", [0, -1], ids=["holder", "home"])
def test_a_worker_is_lost_while_tokens_are_tried(victim: int, oracle: Any) -> None:
    prompt = prompt_ids(400)
    (expected,) = expect(oracle, [prompt], 200)

    @engine_test(3)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with engine_of(client, 45, window_steps=2) as engine:
            running = engine.submit(prompt, replace(GREEDY, max_new_tokens=200))
            while not any(one.generated_tokens > 1 for one in (await engine.status()).sequences.values()):
                await asyncio.sleep(0.01)
            (one,) = (await engine.status()).sequences.values()
            lost = one.placement[victim].worker
            await next(worker for worker in workers if worker.address == lost).close()
            assert list((await running).token_ids) == expected

    run()


def test_a_request_that_makes_way_to_disk_and_one_that_it_makes_way_for_try_tokens(oracle: Any) -> None:
    prompts: Mapping[int, list[int]] = {0: prompt_ids(120, seed=1), 1: prompt_ids(60, seed=2)}
    expected = expect(oracle, [*prompts.values()], 100)

    @engine_test(1)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with engine_of(client, 28, window_steps=2, host_memory=0) as engine:
            first = engine.submit(prompts[0], replace(GREEDY, max_new_tokens=100))
            while not any(one.generated_tokens > 1 for one in (await engine.status()).sequences.values()):
                await asyncio.sleep(0.01)
            urgent = await engine.submit(prompts[1], replace(GREEDY, max_new_tokens=100, priority=1))
            assert told([await first, urgent]) == expected
            assert (await engine.status()).totals["spill_events"] >= 1

    run()
