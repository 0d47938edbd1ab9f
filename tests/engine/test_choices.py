"""Answers from a list of choices: the probabilities of one process, whatever happens to workers in the meantime."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from distributed import Client, Scheduler, Worker

from distkv_dask import Completion, Engine, InvalidRequestError, SamplingParams
from tests._cluster import engine_test
from tests._models import (
    block_bytes,
    choice_probabilities,
    kv_memory,
    model_dir,
    prompt_ids,
    reference_generate,
    text_model_dir,
)

SMALL: dict[str, Any] = {"dtype": "float32", "block_tokens": 8, "prefill_chunk_tokens": 32}
Choices = tuple[tuple[int, ...], ...]
SOME: Choices = ((7,), (8,), (9, 3), (9, 4, 5), (9, 4, 6, 2), (11, 12, 13, 14, 15, 16, 17, 18, 19))


def check(folder: str, prompt: Sequence[int], choices: Choices, done: Completion, end: int | None = None) -> None:
    expected = choice_probabilities(folder, prompt, choices, end)
    assert done.error is None
    assert done.scores is not None
    assert list(done.scores) == list(choices)
    assert list(done.scores.values()) == pytest.approx(expected, abs=1e-4)
    assert done.token_ids == choices[expected.index(max(expected))]
    assert done.finish_reason == "stop"


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2", "qwen3-next", "deepseek-v3"])
def test_probabilities_over_three_workers_are_those_of_one_process(family: str) -> None:
    prompts = [prompt_ids(length, seed=length) for length in (84, 95, 41, 5, 1)]
    folder = str(model_dir(family))

    @engine_test(workers=3)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        memory = None if family == "qwen3-next" else kv_memory(family, 12, 3)
        async with Engine(client, folder, kv_memory=memory, **SMALL) as engine:
            done = await engine.generate(prompts, SamplingParams(choices=SOME))
            for prompt, one in zip(prompts, done, strict=True):
                check(folder, prompt, SOME, one)

    run()


def test_a_choice_that_begins_another_counts_its_end_and_texts_are_answered_as_given() -> None:
    folder, end = str(text_model_dir(end=True)), 498
    words = ("yes", "yes sir", "no", "w300")

    @engine_test(workers=1)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with Engine(client, folder, **SMALL) as engine:
            ids = [tuple(engine.tokenizer.encode_more(word)) for word in words]
            prompt = prompt_ids(30, seed=3)
            done = await engine.submit(prompt, SamplingParams(choices=words, logprobs=2))
            expected = choice_probabilities(folder, prompt, tuple(ids), end)
            assert done.scores == pytest.approx(dict(zip(words, expected, strict=True)), abs=1e-4)
            assert done.text == words[expected.index(max(expected))]
            assert [one.token_id for one in done.logprobs] == list(done.token_ids)
            pieces = engine.stream(prompt, SamplingParams(choices=words))
            assert "".join([piece async for piece in pieces]) == done.text
            drawn = await engine.generate(
                [prompt] * 8, [SamplingParams(choices=words, temperature=50.0, seed=seed) for seed in range(8)]
            )
            assert len({one.text for one in drawn}) > 1

    run()


def test_many_choices_over_one_document_share_its_blocks() -> None:
    folder, text = str(model_dir("llama-gqa")), prompt_ids(60, seed=1)
    questions = [prompt_ids(4 + at % 3, seed=at) for at in range(6)]
    every = [SOME if at % 2 else SOME[:4] for at in range(6)]

    @engine_test(workers=2)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        engine = Engine(client, folder, kv_memory=20 * block_bytes("llama-gqa"), **SMALL)
        async with engine, await engine.ingest(text) as document:
            done = await document.ask(questions, [SamplingParams(choices=one) for one in every])
            for question, choices, one in zip(questions, every, done, strict=True):
                check(folder, [*text, *question], choices, one)
                assert one.reused_tokens == 56

    run()


@pytest.mark.parametrize("victim", [0, -1], ids=["holder", "home"])
def test_a_lost_worker_changes_no_probability(victim: int) -> None:
    prompt, folder = prompt_ids(700, seed=4), str(model_dir("llama-gqa"))

    @engine_test(3)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        memory = 60 * block_bytes("llama-gqa")
        async with Engine(client, folder, kv_memory=memory, **SMALL) as engine:
            running = engine.submit(prompt, SamplingParams(choices=SOME))
            while not any(one.kv_tokens > 32 for one in (await engine.status()).sequences.values()):
                await asyncio.sleep(0.01)
            (one,) = (await engine.status()).sequences.values()
            lost = one.placement[victim].worker
            await next(worker for worker in workers if worker.address == lost).close()
            check(folder, prompt, SOME, await running)

    run()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no choices": ({"choices": []}, "choices is"),
    "a text": ({"choices": "abc"}, "choices is"),
    "an empty choice": ({"choices": ["yes", ""]}, "not empty"),
    "an empty list": ({"choices": [[1], []]}, "not empty"),
    "twice the same": ({"choices": ["yes", "no", "yes"]}, "occurs twice"),
    "with a schema": ({"choices": ["yes"], "schema": {"type": "object"}}, "schema"),
    "with stop": ({"choices": ["yes"], "stop": "e"}, "stop"),
    "half a surrogate": ({"choices": ["\ud800"]}, "surrogate"),
}


@pytest.mark.parametrize("name", BAD)
def test_choices_that_make_no_sense_are_refused_where_they_are_made(name: str) -> None:
    settings, words = BAD[name]
    with pytest.raises(InvalidRequestError, match=words):
        SamplingParams(**settings)


def test_choices_that_the_model_cannot_tell_apart_are_refused_and_the_next_request_is_served() -> None:
    prompt = prompt_ids(20, seed=3)
    folder = str(text_model_dir())  # without an end-of-sequence token
    (expected,) = reference_generate(folder, [prompt], 4)

    @engine_test(1)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with Engine(client, folder, granularity="layer", **SMALL) as engine:
            same = [engine.tokenizer.encode_more("y"), "y"]
            for choices, words in ((same, "same tokens"), ([[1], [99999]], "vocabulary"), (["yes", "n"], "by layer")):
                with pytest.raises(InvalidRequestError, match=words):
                    engine.submit(prompt, SamplingParams(choices=choices))
            done = await engine.submit(prompt, SamplingParams(choices=["y", "n"]))
            assert sum(done.scores.values()) == pytest.approx(1)
        async with Engine(client, folder, **SMALL) as engine:
            with pytest.raises(InvalidRequestError, match="end-of-sequence"):
                await engine.submit(prompt, SamplingParams(choices=["yes", "yes sir"]))
            done = await engine.submit(prompt, SamplingParams(max_new_tokens=4))
            assert list(done.token_ids) == expected.tokens

    run()


def test_scores_and_scored_prompts_go_together() -> None:
    folder, prompt = str(model_dir("llama-gqa")), prompt_ids(45, seed=6)

    @engine_test(1)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with Engine(client, folder, **SMALL) as engine:
            both = SamplingParams(choices=SOME, prompt_logprobs=1, logprobs=3)
            done = await engine.submit(prompt, both)
            check(folder, prompt, SOME, done)
            plain = await engine.submit(prompt, replace(both, choices=None, max_new_tokens=1))
            assert [one and one.token_id for one in done.prompt_logprobs] == [None, *prompt[1:]]
            for one, other in zip(done.prompt_logprobs[1:], plain.prompt_logprobs[1:], strict=True):
                assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
                assert len(one.best) == 1
            assert all(len(one.best) == 3 for one in done.logprobs)

    run()
