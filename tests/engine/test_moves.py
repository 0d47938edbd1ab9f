"""Blocks of running sequences move between workers while they decode, and no tokens change."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from distributed import Client, Scheduler, Worker
from distributed.comm.core import CommClosedError

from distkv_dask import CapacityError, Engine, SamplingParams, SequenceStatus
from tests._cluster import SLOW, engine_test
from tests._models import model_dir, prompt_ids, reference_generate
from tests._splits import move_at_random

SMALL: dict[str, Any] = {"dtype": "float32", "kv_memory": "2 MiB", "block_tokens": 8, "prefill_chunk_tokens": 32}


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
            assert state.life.moves.moved_blocks > 5
            assert all(one.used_blocks == 0 for one in (await engine.status()).workers.values())
            cached = [state.life.ledger.workers[worker.address].cached for worker in workers]
            for _ in range(200):  # the last releases may still be on their way
                pools = [one.runtime.pool.used_blocks for worker in workers for one in open_on(worker)]
                if pools == cached:
                    break
                await asyncio.sleep(0.02)
            assert pools == cached

    run()


def open_on(worker: Worker) -> list[Any]:
    return list(worker.plugins["distkv"].engines.values())


async def decoding(engine: Engine, sequence: int = 0) -> SequenceStatus:
    """Wait until a sequence decodes, and return its status."""
    while True:
        one = (await engine.status()).sequences.get(sequence)
        if one is not None and one.generated_tokens > 1:
            return one
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("which", [0, -1], ids=["holder", "home"])
def test_a_retired_worker_is_emptied_first_and_its_request_goes_on_unchanged(which: int) -> None:
    prompt, new = prompt_ids(400), 400
    expected = reference_generate(model_dir("llama-gqa"), [prompt], new)[0].tokens

    @engine_test(workers=3)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with Engine(client, str(model_dir("llama-gqa")), window_steps=4, **SMALL) as engine:  # 680 tokens each
            running = engine.submit(prompt, SamplingParams(max_new_tokens=new, ignore_eos=True))
            leaving = (await decoding(engine)).placement[which].worker
            assert leaving in await client.retire_workers([leaving])
            assert leaving not in (await engine.status()).workers
            assert (await engine.status()).sequences, "it went on"
            assert list((await running).token_ids) == expected

    run()


@engine_test(workers=1)
async def test_a_worker_whose_blocks_fit_nowhere_else_is_not_retired(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    async with Engine(client, str(model_dir("llama-gqa")), timeout_drain=0.3, window_steps=4, **SMALL) as engine:
        running = engine.submit(prompt_ids(50), SamplingParams(max_new_tokens=600, ignore_eos=True))
        leaving = (await decoding(engine)).placement[0].worker
        assert scheduler.workers_to_close(n=1) == []
        assert await client.retire_workers([leaving]) == {}
        assert (await running).finish_reason == "length"
        assert (await engine.generate([[1]], SamplingParams(max_new_tokens=2)))[0].error is None


@pytest.mark.parametrize("how", ["dask fails", "the call is cancelled"])
def test_a_worker_whose_retirement_fails_gets_work_again(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    @engine_test(workers=1)
    async def run(client: Client, scheduler: Scheduler, worker: Worker) -> None:
        async with Engine(client, str(model_dir("llama-gqa")), window_steps=4, **SMALL) as engine:
            if how == "dask fails":

                async def fail(**kwargs: Any) -> None:
                    raise CommClosedError("a worker's stream closed just now")

                monkeypatch.setattr(scheduler, "retire_workers", fail)
                with pytest.raises(CommClosedError):
                    await client.retire_workers([worker.address])
            else:
                running = engine.submit(prompt_ids(50), SamplingParams(max_new_tokens=600, ignore_eos=True))
                await decoding(engine)
                retiring = asyncio.create_task(scheduler.plugins["distkv"].retire_workers([worker.address]))
                await asyncio.sleep(0.1)
                assert retiring.cancel()
                assert (await running).finish_reason == "length"
            assert (await engine.generate([[1]], SamplingParams(max_new_tokens=2)))[0].error is None

    run()


def test_memory_workers_hold_a_context_three_times_as_large_as_the_homes_memory() -> None:
    prompt, new = prompt_ids(300), 30
    expected = reference_generate(model_dir("llama-gqa"), [prompt], new)[0].tokens

    @engine_test(workers=1, memory=3)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        memory = 110 * 3 * 2 * 2 * 64 * 4  # 110 tokens on each
        async with Engine(client, str(model_dir("llama-gqa")), **(SMALL | {"kv_memory": memory})) as engine:
            status = await engine.status()
            assert sorted(one.role for one in status.workers.values()) == [
                "instance",
                "memory",
                "memory",
                "memory",
            ]
            assert all(engine.model is None for worker in workers[1:] for engine in open_on(worker))
            done = await engine.generate([prompt], SamplingParams(max_new_tokens=new, ignore_eos=True))
            assert list(done[0].token_ids) == expected
            assert len({span.worker for span in done[0].placement}) == 4
            assert done[0].placement[-1].worker == workers[0].address

    run()


@pytest.mark.parametrize("policy", ["overflow", "best"])
def test_workers_of_unequal_memory_each_hold_what_they_have_room_for(policy: str) -> None:
    prompts, new = [prompt_ids(250), prompt_ids(40, seed=1), prompt_ids(90, seed=2)], 30
    expected = [one.tokens for one in reference_generate(model_dir("llama-gqa"), prompts, new)]
    block = 8 * 3 * 2 * 2 * 64 * 4
    room = [5, 11, 23, 2, 9]  # blocks

    @engine_test(workers=3, memory=2, own_kv=[blocks * block for blocks in room])
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with Engine(client, str(model_dir("llama-gqa")), policy=policy, **SMALL) as engine:
            status = (await engine.status()).workers
            assert [status[worker.address].capacity_blocks for worker in workers] == room
            sampling = SamplingParams(max_new_tokens=new, ignore_eos=True)
            done = await engine.generate(prompts, sampling)
            assert [list(one.token_ids) for one in done] == expected
            assert len({span.worker for span in done[0].placement}) > 1, "35 blocks fit on no worker"
            with pytest.raises(CapacityError, match=r"distkv\.policy"):
                await engine.submit(prompt_ids(sum(room) * 8), sampling)

    run()


def test_a_worker_that_joins_takes_over_a_part_of_a_long_request_which_goes_on_unchanged() -> None:
    prompt, new = prompt_ids(2200), 300 if SLOW else 1200  # it must still be decoding when the worker has joined
    expected = reference_generate(model_dir("llama-gqa"), [prompt], new)[0].tokens

    @engine_test(workers=1)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        settings = SMALL | {
            "kv_memory": "12 MiB",
            "window_steps": 4,
            "move_tokens_per_step": 256,
            "prefill_chunk_tokens": 512,
        }
        async with Engine(client, str(model_dir("llama-gqa")), performance="preset", **settings) as engine:
            (state,) = scheduler.plugins["distkv"].engines.values()
            running = engine.submit(prompt, SamplingParams(max_new_tokens=new, ignore_eos=True))
            await decoding(engine)
            async with Worker(scheduler.address, nthreads=1) as joined:
                while len((await engine.status()).workers) < 2:
                    await asyncio.sleep(0.01)
                model = state.life.policy.model
                slow = replace(model.curve, token=1.0)  # so that it pays to compute half of the attention elsewhere
                state.life.know_costs(replace(model, curve=slow, curves={}))
                assert list((await running).token_ids) == expected
                assert (await engine.status()).totals["moved_blocks"] >= 128
                assert (await running).placement[0].worker == joined.address
                await client.retire_workers([joined.address])

    run()
