"""Chats whose KV made room between turns have the tokens of plain transformers, wherever the KV was."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, Scheduler, Worker

from distkv_dask import Engine, EngineStatus, SamplingParams
from distkv_dask.completion import Completion
from distkv_dask.local_folder import LocalFolder
from distkv_dask.scheduler.cache import copies
from distkv_dask.worker.blocks.spilled import Spilled
from tests._cluster import engine_test
from tests._models import block_bytes, model_dir, prompt_ids, reference_generate

BLOCK = 8
SIZE = block_bytes("llama-gqa")
SMALL: dict[str, Any] = {"dtype": "float32", "block_tokens": BLOCK, "prefill_chunk_tokens": 32, "host_memory": 0}
TWELVE = SamplingParams(max_new_tokens=12, ignore_eos=True)
FIRST, OTHER = prompt_ids(80, seed=1), prompt_ids(90, seed=2)
KEPT = (80 + 11) // BLOCK
"""Whole blocks of the first turn."""


@pytest.fixture(autouse=True)
def small_extents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "EXTENT_TOKENS", 2 * BLOCK)


@pytest.fixture
def copy_no_more(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Stops copies to lower tiers, where KV of other requests would replace older KV."""
    return lambda: monkeypatch.setattr(copies, "AHEAD", -1.0)


def small(client: Client, blocks: int = 14, **settings: Any) -> Engine:
    """An engine whose workers have room for little more than one chat."""
    return Engine(client, str(model_dir("llama-gqa")), kv_memory=blocks * SIZE, **SMALL | settings)


async def turn(engine: Engine, prompt: list[int]) -> Completion:
    """Answer a prompt as transformers would."""
    (done,) = await engine.generate([prompt], TWELVE)
    (right,) = reference_generate(model_dir("llama-gqa"), [prompt], 12)
    assert list(done.token_ids) == right.tokens
    return done


async def until(engine: Engine, seen: Callable[[EngineStatus], bool]) -> EngineStatus:
    """Wait for work in the background; the test has a time limit."""
    while not seen(status := await engine.status()):
        await asyncio.sleep(0.01)
    return status


async def displaced(engine: Engine, is_kept: Callable[[EngineStatus], bool]) -> Completion:
    """Run the first turn of a chat; another chat takes its room once its KV is in a lower tier."""
    first = await turn(engine, FIRST)
    await until(engine, is_kept)
    await turn(engine, OTHER)
    return first


async def second_turn(engine: Engine, first: Completion) -> tuple[Completion, int]:
    """Continue the first chat; also returns how many tokens were computed for it."""
    before = (await engine.status()).totals["prefilled_tokens"]
    done = await turn(engine, [*FIRST, *first.token_ids, *prompt_ids(9, seed=3)])
    return done, int((await engine.status()).totals["prefilled_tokens"] - before)


def tier(status: EngineStatus, name: str) -> int:
    return sum(getattr(one.tiers, name) for one in status.workers.values())


def is_on_disk(status: EngineStatus, blocks: int) -> bool:
    """Whether this many blocks are written (the tier also counts those being written)."""
    return tier(status, "disk") == blocks and status.totals.get("copied_disk_blocks", 0) >= blocks


def is_reading(status: EngineStatus) -> bool:
    return any(one.state == "fetching" for one in status.sequences.values())


def files_on(worker: Worker) -> list[Path]:
    return [*Path(worker.local_directory).glob("distkv-*/*.arrow")]


@engine_test(1)
async def test_a_chat_comes_back_from_disk(client: Client, scheduler: Scheduler, worker: Worker) -> None:
    async with small(client) as engine:
        first = await displaced(engine, lambda status: is_on_disk(status, KEPT))
        done, computed = await second_turn(engine, first)
        assert done.reused_tokens == KEPT * BLOCK
        assert computed == 101 - KEPT * BLOCK
        assert (await engine.status()).totals["reused_disk_tokens"] > 0


@engine_test(1, memory=1, own_kv=(14 * SIZE, 60 * SIZE))
async def test_a_chat_comes_back_from_another_workers_memory(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    async with small(client) as engine:
        first = await displaced(engine, lambda status: status.totals.get("copied_workers_blocks") == KEPT)
        done, computed = await second_turn(engine, first)
        status = await engine.status()
        assert done.reused_tokens == KEPT * BLOCK
        assert computed == 101 - KEPT * BLOCK
        assert status.totals["reused_workers_tokens"] > 0
        assert status.workers[workers[1].address].tiers.workers >= KEPT
        assert not files_on(workers[0])


@engine_test(1, memory=1, own_kv=(14 * SIZE, 60 * SIZE))
async def test_a_worker_that_dies_with_a_chat_costs_only_time(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    async with small(client) as engine:
        first = await displaced(engine, lambda status: status.totals.get("copied_workers_blocks") == KEPT)
        await workers[1].close()
        await until(engine, lambda status: len(status.workers) == 1)
        done, _ = await second_turn(engine, first)
        assert done.reused_tokens < KEPT * BLOCK


def test_a_chat_that_lost_its_front_computes_only_that(copy_no_more: Callable[[], None]) -> None:
    @engine_test(1)
    async def run(client: Client, scheduler: Scheduler, worker: Worker) -> None:
        async with small(client, spill=6 * SIZE) as engine:  # the disk has room for half of the chat: its end
            first = await turn(engine, FIRST)
            await until(engine, lambda status: is_on_disk(status, 6))
            copy_no_more()
            await turn(engine, prompt_ids(100, seed=2))  # takes all blocks
            done, computed = await second_turn(engine, first)
            assert done.reused_tokens == 6 * BLOCK
            assert computed == 101 - 6 * BLOCK

    run()


def test_a_chat_that_lost_its_middle_computes_only_that(copy_no_more: Callable[[], None]) -> None:
    @engine_test(1)
    async def run(client: Client, scheduler: Scheduler, worker: Worker) -> None:
        async with small(client, spill=4 * SIZE) as engine:
            first = await turn(engine, FIRST)
            await until(engine, lambda status: is_on_disk(status, 4))
            copy_no_more()
            await turn(engine, prompt_ids(66, seed=2))  # takes ten blocks: four of the chat's stay
            done, computed = await second_turn(engine, first)
            totals = (await engine.status()).totals
            assert totals["reused_memory_tokens"] >= BLOCK
            assert totals["reused_disk_tokens"] == 4 * BLOCK
            assert done.reused_tokens < KEPT * BLOCK
            assert computed == 101 - done.reused_tokens

    run()


@pytest.mark.parametrize("damage", ["a byte", "a file"])
def test_a_damaged_file_is_noticed_and_computed_again(damage: str) -> None:
    @engine_test(1)
    async def run(client: Client, scheduler: Scheduler, worker: Worker) -> None:
        async with small(client) as engine:
            first = await turn(engine, FIRST)
            await until(engine, lambda status: is_on_disk(status, KEPT))
            for file in files_on(worker):
                data = bytearray(file.read_bytes())
                data[len(data) // 2] ^= 1
                file.write_bytes(data) if damage == "a byte" else file.unlink()
            await turn(engine, prompt_ids(100, seed=2))
            done, computed = await second_turn(engine, first)
            assert (done.reused_tokens, computed) == (0, 101)

    run()


@engine_test(1)
async def test_a_disk_that_is_full_is_said_and_costs_only_time(
    client: Client, scheduler: Scheduler, worker: Worker
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalFolder, "create", full)
        async with small(client) as engine:
            first = await turn(engine, FIRST)
            status = await until(engine, lambda status: bool(status.workers[worker.address].disk_error))
            assert "No space left" in status.workers[worker.address].disk_error
            assert status.workers[worker.address].disk_bytes == 0
            await turn(engine, prompt_ids(100, seed=2))
            done, computed = await second_turn(engine, first)
            assert (done.reused_tokens, computed) == (0, 101)


@pytest.mark.parametrize("goes_on", [True, False])
def test_nobody_waits_for_a_chat_that_is_read_back_and_it_does_not_wait_forever(goes_on: bool) -> None:
    free, read = threading.Event(), Spilled.read

    def slow(*arguments: Any) -> None:
        free.wait(60)
        read(*arguments)

    @engine_test(1)
    async def run(client: Client, scheduler: Scheduler, worker: Worker) -> None:
        limit = 60 if goes_on else 0.5
        async with small(client, 30, timeout_files=limit) as engine:
            first = await turn(engine, FIRST)
            await turn(engine, prompt_ids(100, seed=5))
            await until(engine, lambda status: tier(status, "disk") >= KEPT)
            await turn(engine, prompt_ids(228, seed=2))  # takes all blocks
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Spilled, "read", slow)
                later = asyncio.ensure_future(second_turn(engine, first))
                if goes_on:
                    await until(engine, is_reading)
                    await turn(engine, prompt_ids(60, seed=6))  # is computed and decoded in the meantime
                    assert not later.done()
                    free.set()
                done, _ = await later
                free.set()
                assert (done.reused_tokens > 0) == goes_on

    run()


@pytest.mark.parametrize("family", ["gemma2", "qwen3-next"])
def test_models_whose_homes_have_more_than_kv_keep_only_what_they_can_begin_with(family: str) -> None:
    """There KV alone cannot be reused as a prefix: what makes room is dropped with its snapshots."""

    @engine_test(1)
    async def run(client: Client, scheduler: Scheduler, worker: Worker) -> None:
        settings = SMALL | {"window_batch": 2}
        async with Engine(client, str(model_dir(family)), kv_memory="3 MiB", **settings) as engine:
            prompts = [prompt_ids(80, seed=seed) for seed in range(1, 4)]
            for _ in range(2):
                for at, prompt in enumerate(prompts):
                    (done,) = await engine.generate([prompt], TWELVE)
                    (right,) = reference_generate(model_dir(family), [prompt], 12)
                    assert list(done.token_ids) == right.tokens
                    prompts[at] = [*prompt, *done.token_ids, *prompt_ids(9, seed=9)]
            totals = (await engine.status()).totals
            assert not totals.get("copied_disk_blocks")
            assert not totals.get("copied_workers_blocks")

    run()
