"""Layers divided among workers: for all stages and batches, greedy float32 tokens are those of plain transformers."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest
import torch
import transformers
from distributed import Client, LocalCluster, Scheduler, Worker

from distkv_dask import ClusterError, ConfigError, Engine, SamplingParams
from distkv_dask.errors import SavedDocumentError, UnsupportedModelError
from tests._cluster import PROTOCOL, client_of_all, decoding, engine_test
from tests._models import model_dir, prompt_ids, reference_generate

NEW = 12
GREEDY = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
SMALL: dict[str, Any] = {"dtype": "float32", "block_tokens": 8, "prefill_chunk_tokens": 32}
PROMPTS = [prompt_ids(length, seed=length) for length in (230, 5, 61, 8, 33)]


@pytest.mark.parametrize(
    ("family", "stages", "speculation"),
    [("llama-gqa", 3, "off"), ("qwen3", 2, 2), ("qwen3-moe", 2, "off"), ("deepseek-v3", 2, "off")],
)
def test_a_model_in_stages_gives_the_tokens_of_one_process(family: str, stages: int, speculation: str | int) -> None:
    expected = [one.tokens for one in reference_generate(model_dir(family), PROMPTS, NEW)]

    @engine_test(workers=stages + 1)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        given = {"kv_memory": "2 MiB", "stages": stages, "speculation": speculation, **SMALL}
        async with Engine(client, str(model_dir(family)), **given) as engine:
            together = await engine.generate(PROMPTS, GREEDY)
            assert [list(one.token_ids) for one in together] == expected
            again = await engine.submit(PROMPTS[0], GREEDY)
            assert list(again.token_ids) == expected[0]
            assert again.reused_tokens > 0
            (home,) = (await engine.status()).workers.values()
            assert "layers 0 to" in home.weights

    run()


def test_long_chunks_and_large_batches_go_through_stages_in_parts_and_exactly() -> None:
    prompts = [prompt_ids(length, seed=length) for length in (230, 410, 70, 9, 33, 129, 5, 64, 65)]
    expected = [one.tokens for one in reference_generate(model_dir("llama-gqa"), prompts, NEW)]

    @engine_test(workers=3)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        given = {"kv_memory": "4 MiB", "stages": 3, **SMALL, "prefill_chunk_tokens": 300}
        async with Engine(client, str(model_dir("llama-gqa")), **given) as engine:
            together = await engine.generate(prompts, GREEDY)
            assert [list(one.token_ids) for one in together] == expected
            scored = await engine.submit(prompts[1], SamplingParams(max_new_tokens=1, prompt_logprobs=0))
            assert scored.prompt_logprobs is not None
            found = [one.logprob for one in scored.prompt_logprobs if one is not None]
            assert found == pytest.approx(logprobs_of(prompts[1]), abs=1e-4)

    run()


def logprobs_of(prompt: list[int]) -> list[float]:
    """Log probabilities of a prompt's tokens but the first, by one forward of plain transformers."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(model_dir("llama-gqa"), dtype=torch.float32).eval()
    with torch.no_grad():
        scores = plain(torch.tensor([prompt])).logits[0].double().log_softmax(-1)
    return [float(row[token]) for row, token in zip(scores, prompt[1:], strict=False)]


def test_questions_on_a_document_in_stages_are_answered_exactly_and_it_is_not_saved(tmp_path: Any) -> None:
    text, questions = prompt_ids(100, seed=1), [prompt_ids(9, seed=2), prompt_ids(17, seed=3)]
    expected = reference_generate(model_dir("llama-gqa"), [text + one for one in questions], NEW)

    @engine_test(workers=2)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        given = {"kv_memory": "1 MiB", "stages": 2, **SMALL}
        async with Engine(client, str(model_dir("llama-gqa")), **given) as engine:
            document = await engine.ingest(text)
            done = await asyncio.gather(*(document.submit(one, GREEDY) for one in questions))
            assert [list(one.token_ids) for one in done] == [one.tokens for one in expected]
            with pytest.raises(SavedDocumentError, match=r"distkv\.stages"):
                await document.save(tmp_path)
            await document.release()

    run()


def test_requests_that_do_not_fit_together_in_stages_take_turns() -> None:
    prompts = [prompt_ids(60, seed=seed) for seed in range(4)]
    expected = [one.tokens for one in reference_generate(model_dir("llama-gqa"), prompts, NEW)]

    @engine_test(workers=2)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        given = {"kv_memory": "192 KiB", "stages": 2, **SMALL}
        async with Engine(client, str(model_dir("llama-gqa")), **given) as engine:
            done = await engine.generate(prompts, GREEDY)
            assert [list(one.token_ids) for one in done] == expected

    run()


def test_what_does_not_go_with_stages_is_refused_by_name() -> None:
    @engine_test(workers=2)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        refused: list[tuple[type[Exception], str, str, dict[str, Any]]] = [
            (ConfigError, "granularity", "llama-gqa", {"granularity": "layer"}),
            (ConfigError, "deterministic", "llama-gqa", {"deterministic": True}),
            (ConfigError, "weights", "llama-gqa", {"weights": "disk"}),
            (ClusterError, "2 workers", "llama-gqa", {"stages": 3}),
            (UnsupportedModelError, "stages", "gpt-oss", {}),
        ]
        for error, words, family, settings in refused:
            given = {"kv_memory": "2 MiB", "stages": 2, **SMALL, **settings}
            with pytest.raises(error, match=words):
                await Engine(client, str(model_dir(family)), **given)

    run()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [pytest.param("home", marks=pytest.mark.thorough), "stage"])
def test_a_killed_stage_costs_a_request_no_token(victim: str) -> None:
    prompt, new = prompt_ids(100), 240
    expected = reference_generate(model_dir("llama-gqa"), [prompt], new)[0].tokens
    with (
        LocalCluster(n_workers=3, threads_per_worker=1, protocol=PROTOCOL, dashboard_address=None) as cluster,
        client_of_all(cluster) as client,
        Engine(client, str(model_dir("llama-gqa")), kv_memory="2 MiB", stages=2, window_steps=4, **SMALL) as engine,
    ):
        request = engine.submit(prompt, SamplingParams(max_new_tokens=new, ignore_eos=True))
        home = decoding(engine)[0].placement[0].worker
        stage = engine.status().workers[home].weights.rpartition(" ")[2]
        gone = home if victim == "home" else stage
        os.kill(client.run(os.getpid, workers=[gone])[gone], signal.SIGKILL)
        assert list(request.result(120).token_ids) == expected
