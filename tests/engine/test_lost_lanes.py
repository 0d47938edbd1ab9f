"""A worker whose compute thread ends is treated like a dead one: answers are the same, and it joins again."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from distributed import Client, Scheduler, Worker

from distkv_dask import Engine, SamplingParams, SequenceStatus
from distkv_dask.scheduler.engines.opening import MAX_REOPENINGS
from distkv_dask.worker.lanes import Lanes
from tests._cluster import engine_test
from tests._models import model_dir, prompt_ids, reference_generate

# 680 tokens fit on a worker; windows are short, so that a request is seen decoding before it ends.
TINY: dict[str, Any] = {
    "dtype": "float32",
    "kv_memory": "2 MiB",
    "block_tokens": 8,
    "prefill_chunk_tokens": 32,
    "window_steps": 4,
}
NEW = 300
WIDE = prompt_ids(800)
LONG = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
SHORT = SamplingParams(max_new_tokens=8, ignore_eos=True)


def end_holder_lane(lanes: Lanes) -> None:
    lanes.holder.submit(sys.exit)


def end_home_lane(lanes: Lanes) -> None:
    lanes.home.submit_next(int).add_done_callback(lambda _: sys.exit())


def lanes_of(worker: Worker) -> Lanes | None:
    return worker.plugins["distkv"].lanes


def lanes_alive() -> int:
    return sum(thread.name.startswith("distkv-") for thread in threading.enumerate())


def blocks(engine: Engine, worker: Worker) -> int:
    used: int = worker.plugins["distkv"].engines[engine.id].runtime.pool.used_blocks
    return used


async def until(call: Callable[[], Any]) -> Any:
    for _ in range(1200):
        found = call()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return found
        await asyncio.sleep(0.05)
    raise AssertionError("it did not happen in time")


async def decoding(engine: Engine) -> SequenceStatus | None:
    """The sequence, once it decodes."""
    for one in (await engine.status()).sequences.values():
        if one.generated_tokens > 1:
            return one
    return None


@pytest.mark.parametrize("end", [end_holder_lane, end_home_lane])
@pytest.mark.parametrize("member", ["home", "holder"])
def test_a_lane_that_ends_costs_a_request_no_token_and_is_started_again(
    end: Callable[[Lanes], None], member: str
) -> None:
    @engine_test(workers=3)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with Engine(client, str(model_dir("llama-gqa")), prefix_cache=False, **TINY) as engine:
            wide = engine.submit(WIDE, LONG)
            sequence = await until(lambda: decoding(engine))
            assert len(sequence.placement) == 2
            address = sequence.placement[-1 if member == "home" else 0].worker
            (victim,) = [worker for worker in workers if worker.address == address]
            before = lanes_of(victim)
            assert before is not None
            end(before)
            assert list((await wide).token_ids) == reference_generate(model_dir("llama-gqa"), [WIDE], NEW)[0].tokens
            await until(lambda: _opened(engine, 3))
            after = lanes_of(victim)
            assert after is not None
            assert after is not before
            assert not after.closed
            expected = reference_generate(model_dir("llama-gqa"), [WIDE], 8)[0].tokens
            done = await engine.generate([WIDE] * 2, SHORT)
            assert [list(one.token_ids) for one in done] == [expected] * 2
            status = await engine.status()
            assert not any(one.used_blocks for one in status.workers.values())
            await until(lambda: not any(map(partial(blocks, engine), workers)))
            assert (status.totals["loss_events"], status.totals["repair_events"]) == (1, 1)

    run()


async def _opened(engine: Engine, workers: int) -> bool:
    return len((await engine.status()).workers) == workers


@engine_test(workers=2)
async def test_lanes_that_end_again_and_again_are_not_started_for_ever(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    async with Engine(client, str(model_dir("llama-gqa")), **TINY) as engine:
        manager, victim = scheduler.plugins["distkv"], workers[0]
        state = manager.engines[engine.id]
        for _ in range(MAX_REOPENINGS):
            lanes = lanes_of(victim)
            assert lanes is not None
            end_holder_lane(lanes)
            await until(lambda lanes=lanes: lanes.closed and victim.address in state.facts and lanes_of(victim))
            await until(lambda lanes=lanes: lanes_of(victim) not in (None, lanes) and victim.address in state.facts)
        lanes = lanes_of(victim)
        assert lanes is not None
        end_holder_lane(lanes)
        await until(lambda: victim.address not in state.facts and lanes_of(victim) is None)
        done = await engine.generate([prompt_ids(30)], SHORT)
        assert list(done[0].token_ids) == reference_generate(model_dir("llama-gqa"), [prompt_ids(30)], 8)[0].tokens
        assert list((await engine.status()).workers) == [workers[1].address]


@engine_test(workers=2)
async def test_engines_that_share_a_lane_are_all_opened_again(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    one = await Engine(client, str(model_dir("llama-gqa")), **TINY)
    two = await Engine(client, str(model_dir("llama-gqa")), **TINY)
    before = lanes_of(workers[0])
    assert before is not None
    end_holder_lane(before)
    await until(lambda: lanes_of(workers[0]) not in (None, before))
    for engine in (one, two):
        await until(lambda engine=engine: _opened(engine, 2))
        done = await engine.generate([prompt_ids(30)] * 4, SHORT)
        expected = reference_generate(model_dir("llama-gqa"), [prompt_ids(30)], 8)[0].tokens
        assert [list(done_one.token_ids) for done_one in done] == [expected] * 4
        await engine.close()


@engine_test(workers=2)
async def test_an_engine_is_closed_while_a_lane_is_started_again(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    for _ in range(5):
        engine = await Engine(client, str(model_dir("llama-gqa")), **TINY)
        lanes = lanes_of(workers[0])
        assert lanes is not None
        end_holder_lane(lanes)
        await engine.close()
        assert lanes_alive() == 0


@engine_test(workers=1)
async def test_a_worker_has_closed_an_engine_once_its_lanes_have_ended(
    client: Client, scheduler: Scheduler, worker: Worker
) -> None:
    engine = await Engine(client, str(model_dir("llama-gqa")), **TINY)
    lanes, go_on = lanes_of(worker), threading.Event()
    assert lanes is not None
    lanes.home.submit(go_on.wait)
    closing = asyncio.ensure_future(engine.close())
    await until(lambda: not worker.plugins["distkv"].engines)
    end_holder_lane(lanes)
    await until(lambda: lanes_alive() == 1)
    lanes.home.submit(time.sleep, 1.0)
    go_on.set()
    await closing
    assert lanes_alive() == 0


@pytest.mark.parametrize("beside", [0, 1])
def test_a_lane_that_ends_as_an_engine_opens_is_started_again(beside: int) -> None:
    @engine_test(workers=1)
    async def run(client: Client, scheduler: Scheduler, worker: Worker) -> None:
        first = await _open(client)
        if not beside:
            await first.close()
        manager = worker.plugins["distkv"]
        opening = asyncio.ensure_future(_open(client))
        while not manager._changing.locked():
            await asyncio.sleep(0)
        while manager.lanes is None or len(manager.lanes.holder._services) == beside:
            time.sleep(0.01)
        time.sleep(0.5)  # meanwhile the worker's loop is blocked: the engine is open, but has not been reported
        end_holder_lane(manager.lanes)
        while lanes_alive() > 1:
            time.sleep(0.01)
        async with await opening as engine:
            done = await engine.generate([prompt_ids(30)], SHORT)
            assert list(done[0].token_ids) == reference_generate(model_dir("llama-gqa"), [prompt_ids(30)], 8)[0].tokens
        await first.close()

    run()


async def _open(client: Client) -> Engine:
    return await Engine(client, str(model_dir("llama-gqa")), **TINY)
