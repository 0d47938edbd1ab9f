"""Blocks of live sequences move between workers while they decode, and nobody's tokens change."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from distributed import Client, Scheduler, Worker

from distkv_dask import Engine, SamplingParams
from distkv_dask.scheduler.ledger import Ledger
from distkv_dask.scheduler.policies.base import Policy
from distkv_dask.scheduler.policies.overflow import Overflow
from distkv_dask.types import Move
from tests._cluster import engine_test
from tests._models import model_dir, prompt_ids, reference_generate

SMALL: dict[str, Any] = {"dtype": "float32", "kv_memory": "2 MiB", "block_tokens": 8, "prefill_chunk_tokens": 32}


def move_at_random(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Have the policy propose random moves of random blocks between random workers, whenever it is asked."""
    rng = random.Random(seed)

    def moves(policy: Policy, ledger: Ledger, waiting: object) -> list[Move]:
        return list(propose(ledger))

    def propose(ledger: Ledger) -> Iterator[Move]:
        for sequence, account in ledger.sequences.items():
            span = rng.choice(account.placement)
            blocks = (min(span.stop, account.length) - span.start) // ledger.block_tokens
            if blocks > 0:
                first = rng.randrange(blocks)
                last = rng.randint(first + 1, blocks)
                start, stop = (span.start + at * ledger.block_tokens for at in (first, last))
                yield Move(sequence, start, stop, span.worker, rng.choice(sorted(ledger.workers)))

    monkeypatch.setattr(Overflow, "moves", moves)


@pytest.mark.parametrize("granularity", ["window", "layer"])
@pytest.mark.parametrize("seed", range(2))
def test_random_blocks_move_between_random_workers_all_the_time_and_tokens_stay(
    seed: int, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = 40 if granularity == "window" else 12
    prompts = [prompt_ids(length, seed=length) for length in (150, 61, 97, 30)]
    expected = reference_generate(model_dir("llama-gqa"), prompts, new)
    move_at_random(monkeypatch, seed)

    @engine_test(workers=3)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        settings = SMALL | {"window_steps": 2, "granularity": granularity}
        async with Engine(client, str(model_dir("llama-gqa")), **settings) as engine:
            (state,) = scheduler.plugins["distkv"].engines.values()
            done = await engine.generate(prompts, SamplingParams(max_new_tokens=new, ignore_eos=True))
            assert [list(one.token_ids) for one in done] == [one.tokens for one in expected]
            assert state.lifecycle.moving.moved_blocks > 5
            assert all(one["used_blocks"] == 0 for one in (await engine.status())["workers"].values())
            assert all(engine.runtime.pool.used_blocks == 0 for worker in workers for engine in open_on(worker))

    run()


def open_on(worker: Worker) -> list[Any]:
    return list(worker.plugins["distkv"].engines.values())
