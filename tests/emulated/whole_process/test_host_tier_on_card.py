"""An engine whose documents take turns on a card: they wait in host memory, then on disk, and return."""

from __future__ import annotations

import emulated
import pytest
from distributed import Client, Scheduler, Worker

from distkv_dask import Engine, SamplingParams
from distkv_dask.errors import CapacityError
from tests._cluster import engine_test
from tests._models import block_bytes, model_dir, prompt_ids, reference_generate

NEW = 6
GREEDY = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
MODEL = str(model_dir("qwen3"))
DOCUMENTS = [prompt_ids(80, seed=seed) for seed in (4, 5, 6)]
QUESTION = prompt_ids(9, seed=9)
BLOCKS = 10
"""Tokens of a document; the card has room for one document, its question and a little more."""
SMALL = {"dtype": "float32", "block_tokens": 8, "prefill_chunk_tokens": 32, "device": "cuda", "prefix_cache": False}


def answers_of_transformers() -> list[list[int]]:
    prompts = [document + QUESTION for document in DOCUMENTS]
    return [one.tokens for one in reference_generate(model_dir("qwen3"), prompts, NEW)]


def test_documents_go_to_host_memory_and_then_to_disk_and_nobody_computes_them_again() -> None:
    expected = answers_of_transformers()
    size = block_bytes("qwen3")

    @engine_test(workers=1)
    async def run(client: Client, scheduler: Scheduler, worker: Worker) -> None:
        memory = {"kv_memory": 15 * size, "host_memory": (BLOCKS + 3) * size}
        async with Engine(client, MODEL, **memory, **SMALL) as engine:
            kept = [await engine.ingest(document) for document in DOCUMENTS]
            before = (await engine.status()).totals["prefilled_tokens"]
            (one,) = (await engine.status()).workers.values()
            assert (one.host_bytes, one.disk_bytes) == (BLOCKS * size, BLOCKS * size)
            for _ in range(2):
                for document, tokens in zip(kept, expected, strict=True):
                    answer = await document.ask(QUESTION, GREEDY)
                    assert list(answer.token_ids) == tokens
                    assert answer.reused_tokens == 80
            assert (await engine.status()).totals["prefilled_tokens"] - before == 6 * len(QUESTION)
            for document in kept:
                await document.release()
            (one,) = (await engine.status()).workers.values()
            assert (one.host_bytes, one.disk_bytes) == (0, 0)

    run()


@pytest.mark.thorough
def test_blocks_come_and_go_beside_a_request_that_decodes_and_no_lane_waits_for_them() -> None:
    wide, new = prompt_ids(20, seed=1), 200
    (expected,) = reference_generate(model_dir("qwen3"), [wide], new)
    answers = answers_of_transformers()
    size = block_bytes("qwen3")

    @engine_test(workers=1)
    async def run(client: Client, scheduler: Scheduler, worker: Worker) -> None:
        memory = {"kv_memory": (15 + 28) * size, "host_memory": 3 * BLOCKS * size}
        async with Engine(client, MODEL, window_steps=4, **memory, **SMALL) as engine:
            running = engine.submit(wide, SamplingParams(max_new_tokens=new, ignore_eos=True))
            kept = [await engine.ingest(document) for document in DOCUMENTS]
            with emulated.counting() as counts:
                for document, tokens in zip(kept, answers, strict=True):
                    assert list((await document.ask(QUESTION, GREEDY)).token_ids) == tokens
            assert list((await running).token_ids) == expected.tokens
        copies = [one for one in counts.number if one.place.startswith("distkv_dask/worker/blocks/host_tier.py")]
        assert {one.kind for one in copies} == {"h2d", "d2h"}
        assert {one.name for one in copies} == {"pinned"}
        assert not [one for one in copies if "lane" in one.thread]

    run()


def test_more_host_memory_than_the_worker_has_is_refused_with_figures() -> None:
    @engine_test(workers=1)
    async def run(client: Client, scheduler: Scheduler, worker: Worker) -> None:
        limit = worker.memory_manager.memory_limit
        with pytest.raises(CapacityError, match=rf"host memory of {limit} bytes.*of {limit}.*distkv\.host-memory"):
            async with Engine(client, MODEL, kv_memory="1 MiB", host_memory=limit, **SMALL):
                pass

    run()


def test_a_quarter_of_the_workers_memory_is_the_default() -> None:
    @engine_test(workers=1)
    async def run(client: Client, scheduler: Scheduler, worker: Worker) -> None:
        limit = worker.memory_manager.memory_limit
        async with Engine(client, MODEL, kv_memory="1 MiB", **SMALL) as engine:
            (state,) = scheduler.plugins["distkv"].engines.values()
            (room,) = state.life.disks.memory.capacity.values()
            assert limit // 4 - block_bytes("qwen3") < room <= limit // 4
            assert (await engine.generate([QUESTION], GREEDY))[0].finish_reason == "length"

    run()
