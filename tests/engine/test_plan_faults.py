"""Blocks vanish from a worker's pool without the scheduler's knowledge: only the request that owns them fails."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from distributed import Client, Scheduler, Worker

from distkv_dask import Engine, PlanError, SamplingParams
from tests._cluster import engine_test
from tests._models import model_dir, prompt_ids, reference_generate

# 680 tokens fit on a worker
TINY: dict[str, Any] = {"dtype": "float32", "kv_memory": "2 MiB", "block_tokens": 8, "window_steps": 2}
SMALL, WIDE = 0, 2
LENGTHS = [30, 30, 200]


@pytest.mark.parametrize("granularity", ["window", "layer"])
@pytest.mark.parametrize("culprit", [SMALL, WIDE], ids=["blocks at the home", "blocks at a holder"])
def test_lost_blocks_of_one_request_fail_no_other_that_decodes_with_it(culprit: int, granularity: str) -> None:
    new = 290 if granularity == "window" else 40
    prompts = [prompt_ids(length + 290 - new, seed=seed) for seed, length in enumerate(LENGTHS)]
    expected = [one.tokens for one in reference_generate(model_dir("llama-gqa"), prompts, new)]

    @engine_test(workers=1, memory=1)
    async def run(client: Client, scheduler: Scheduler, home: Worker, holder: Worker) -> None:
        settings = TINY | {"granularity": granularity, "prefix_cache": False}
        async with Engine(client, str(model_dir("llama-gqa")), **settings) as engine:
            sampling = SamplingParams(max_new_tokens=new, ignore_eos=True)
            running = [engine.submit(prompt, sampling) for prompt in prompts]
            while True:
                sequences = (await engine.status()).sequences
                if len(sequences) == 3 and all(one.generated_tokens > 1 for one in sequences.values()):
                    break
                await asyncio.sleep(0.01)
            spread = [{span.worker for span in sequences[at].placement} for at in range(3)]
            assert spread == [{home.address}, {home.address}, {home.address, holder.address}]
            worker = home if culprit == SMALL else holder
            worker.plugins["distkv"].engines[engine.id].runtime.pool.free(culprit, 0, 1)
            for number, (answer, tokens) in enumerate(zip(running, expected, strict=True)):
                if number == culprit:
                    with pytest.raises(PlanError, match="please report it"):
                        await answer
                else:
                    assert list((await answer).token_ids) == tokens

    run()
