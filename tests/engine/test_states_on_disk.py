"""Models whose homes have more than KV: it is spilled and restored, and moves with the home."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, Scheduler, Worker

from distkv_dask import Engine, SamplingParams
from distkv_dask.config import Config
from distkv_dask.worker.blocks.pool import BlockShape
from distkv_dask.worker.kv_memory import needs_of
from tests._cluster import engine_test
from tests._fakes import loaded
from tests._models import model_dir, prompt_ids, reference_generate
from tests._splits import force_split

SMALL: dict[str, Any] = {"block_tokens": 8, "prefill_chunk_tokens": 32, "window_batch": 2}
GREEDY = SamplingParams(max_new_tokens=10, ignore_eos=True)
QUESTION = prompt_ids(5, seed=5)


def memory_for(family: str, places: int) -> tuple[int, int]:
    """Bytes of KV memory with room for ``places`` states, and the number of blocks in addition to them."""
    geometry = loaded(family).geometry
    needs, block = needs_of(geometry, Config.load(**SMALL)), BlockShape.of(geometry, 8).nbytes
    blocks = max(30, -(-int((places * needs.each + needs.once) * (1 / needs.share - 1)) // block))
    return places * needs.each + needs.once + blocks * block, blocks


@pytest.mark.parametrize("family", ["gemma2", "gpt-oss", "qwen3-next", "granite4-h", "lfm2"])
def test_a_document_comes_back_to_another_home_with_what_only_homes_have(family: str) -> None:
    memory, blocks = memory_for(family, 2)
    text, long = prompt_ids(blocks * 4, seed=4), prompt_ids(blocks * 13, seed=8)
    expected = [one.tokens for one in reference_generate(model_dir(family), [text + QUESTION, long], 10)]

    @engine_test(2)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with Engine(client, str(model_dir(family)), kv_memory=memory, dtype="float32", **SMALL) as engine:
            document = await engine.ingest(text)
            (left,) = {span.worker for span in document.placement}
            assert [list(one.token_ids) for one in await engine.generate([long], GREEDY)] == expected[1:]  # on both
            (there,) = (Path(worker.local_directory) for worker in workers if worker.address == left)
            kinds = {file.name.partition("-")[0] for file in there.glob("distkv-*/*.arrow")}
            assert kinds == {"blocks", "window" if family in ("gemma2", "gpt-oss") else "state"}
            before = (await engine.status()).totals["prefilled_tokens"]
            scheduler.plugins["distkv"].engines[engine.id].life.ledger.retire_worker(left)  # no new blocks go there
            done = await document.ask(QUESTION, GREEDY)
            assert list(done.token_ids) == expected[0]
            computed = (await engine.status()).totals["prefilled_tokens"] - before
            assert computed == len(text) % 8 + len(QUESTION), "only the question was computed"
            await document.release()

    run()


@pytest.mark.parametrize("family", ["gemma2", "gpt-oss", "qwen3-next", "granite4-h", "lfm2"])
def test_a_home_that_leaves_hands_over_what_only_homes_have(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, text, new = prompt_ids(90, seed=3), prompt_ids(100, seed=4), 200
    (answer,) = reference_generate(model_dir(family), [prompt], new)
    (asked,) = reference_generate(model_dir(family), [text + QUESTION], 10)
    workers = force_split([(1, 24), (0, None)], monkeypatch)

    @engine_test(workers=workers + 1)
    async def run(client: Client, scheduler: Scheduler, *them: Worker) -> None:
        settings = {"kv_memory": "8 MiB", "dtype": "float32", "window_steps": 4, **SMALL, "window_batch": 4}
        async with Engine(client, str(model_dir(family)), **settings) as engine:
            document = await engine.ingest(text)
            running = engine.submit(prompt, SamplingParams(max_new_tokens=new, ignore_eos=True))
            while not any(one.generated_tokens > 8 for one in (await engine.status()).sequences.values()):
                await asyncio.sleep(0.02)
            home = document.placement[-1].worker
            assert home in await client.retire_workers([home])
            assert (await engine.status()).sequences, "it went on"
            monkeypatch.undo()
            assert list((await running).token_ids) == answer.tokens
            assert list((await document.ask(QUESTION, GREEDY)).token_ids) == asked.tokens
            computed = (await engine.status()).totals["prefilled_tokens"]
            assert computed == 90 + 96 + 4 + len(QUESTION), "nothing was computed twice"
            await document.release()

    run()
