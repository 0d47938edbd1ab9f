"""Layers with windows, chunks, soft caps, sinks and short values: no operation on their KV changes a token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from distributed import Client, Scheduler, Worker
from torch import Tensor

from distkv_dask import Engine, SamplingParams
from distkv_dask.worker.blocks.pool import Pool
from distkv_dask.worker.by_layer import tasks
from distkv_dask.worker.by_layer.attention import attend_part
from distkv_dask.worker.plan import Part
from distkv_dask.worker.tensor_message import TensorMessage
from tests._cluster import engine_test
from tests._models import block_bytes, model_dir, prompt_ids, reference_generate
from tests._splits import force_split, move_at_random

FAMILIES = ["gemma2-short", "gpt-oss-short", "llama4-short", "deepseek-v3"]
SMALL: dict[str, Any] = {"dtype": "float32", "block_tokens": 8, "prefill_chunk_tokens": 32}
GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)
DOCUMENT = prompt_ids(100, seed=4)
QUESTIONS = [prompt_ids(length, seed=length) for length in (1, 5, 30)]


def wanted(family: str, prompts: list[list[int]]) -> list[list[int]]:
    return [one.tokens for one in reference_generate(model_dir(family), prompts, 12)]


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_are_asked_saved_and_loaded_on_another_number_of_workers(family: str, tmp_path: Path) -> None:
    expected = wanted(family, [DOCUMENT + question for question in QUESTIONS])

    def ask(blocks: int, load: bool) -> None:
        @engine_test(workers=2 if load else 3)
        async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
            memory = blocks * block_bytes(family)
            async with Engine(client, str(model_dir(family)), kv_memory=memory, **SMALL) as engine:
                document = await (engine.load(tmp_path / "saved") if load else engine.ingest(DOCUMENT))
                done = await document.ask(QUESTIONS, GREEDY)
                assert [list(one.token_ids) for one in done] == expected
                assert [one.reused_tokens for one in done] == [96] * 3
                if not load:
                    await document.save(tmp_path / "saved")

        run()

    ask(blocks=9, load=False)  # too large for one worker
    ask(blocks=16, load=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_beginnings_are_shared(family: str) -> None:
    first = prompt_ids(70, seed=7)
    second = first[:60] + prompt_ids(9, seed=8)
    expected = wanted(family, [first, second])

    @engine_test(workers=2)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with Engine(client, str(model_dir(family)), kv_memory=9 * block_bytes(family), **SMALL) as engine:
            done = [await engine.submit(prompt, GREEDY) for prompt in (first, second)]
            assert [list(one.token_ids) for one in done] == expected
            assert [one.reused_tokens for one in done] == [0, 56]

    run()


@pytest.mark.parametrize("granularity", ["window", "layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_move_between_workers_all_the_time(
    family: str, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = prompt_ids(150)
    prompts = [long, long[:100] + prompt_ids(20, seed=1), prompt_ids(61, seed=2), long[:97]]
    expected = wanted(family, prompts)
    move_at_random(monkeypatch, 0)

    @engine_test(workers=3)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        settings = SMALL | {"window_steps": 2, "granularity": granularity}
        async with Engine(client, str(model_dir(family)), kv_memory="4 MiB", **settings) as engine:
            (state,) = scheduler.plugins["distkv"].engines.values()
            done = await engine.generate(prompts, GREEDY)
            assert [list(one.token_ids) for one in done] == expected
            assert state.life.moves.moved_blocks > 0

    run()


def test_tasks_ask_no_holder_outside_a_layers_window(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompt_ids(70)
    expected = wanted("gemma2-short", [prompt])
    size = force_split([(0, 16), (1, None)], monkeypatch)
    layers = set()

    def attended(pool: Pool, part: Part, question: TensorMessage) -> tuple[Tensor, Tensor]:
        if not any(row.appends for row in part.rows) and part.rows[0].positions[0] >= 64:
            layers.add(question.about.layer)
        return attend_part(pool, part, question)

    monkeypatch.setattr(tasks, "attend_part", attended)

    @engine_test(workers=size)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with Engine(
            client, str(model_dir("gemma2-short")), granularity="layer", kv_memory="4 MiB", **SMALL
        ) as engine:
            (done,) = await engine.generate([prompt], GREEDY)
            assert list(done.token_ids) == expected[0]

    run()
    assert layers == {1}
