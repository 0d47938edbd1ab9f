"""A user's calls of an engine: generate, submit, stream, cancel, status; alone and with other requests."""

from __future__ import annotations

import asyncio
from concurrent.futures import CancelledError

import pytest
from distributed import Client, LocalCluster, Scheduler, Worker

from distkv_dask import Completion, Engine, EngineClosedError, ResultTimeoutError, SamplingParams
from tests._cluster import engine_test, until_idle, when_idle
from tests._models import model_dir, prompt_ids, reference_generate

TINY = {"dtype": "float32", "kv_memory": "4 MiB", "block_tokens": 8, "prefill_chunk_tokens": 32}
POOLS = ("asyncio_", "Dask-", "IO loop")  # threads of Python's and Dask's pools, which grow and shrink
LONG = SamplingParams(max_new_tokens=2000, ignore_eos=True)


def tiny(client: Client, **settings: object) -> Engine:
    return Engine(client, str(model_dir("llama-gqa")), **(TINY | settings))


def test_synchronous_use_from_a_plain_script() -> None:
    prompt = prompt_ids(70)
    expected = tuple(reference_generate(model_dir("llama-gqa"), [prompt], 8)[0].tokens)
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as client,
        tiny(client) as engine,
    ):
        assert [one.token_ids for one in engine.generate([prompt, prompt], params)] == [expected] * 2
        assert engine.submit(prompt, params).result(60).token_ids == expected
        with engine.stream(prompt, LONG) as unread, pytest.raises(ResultTimeoutError, match="and continues"):
            unread._generation.result(0.01)
        pieces = engine.stream(prompt, params)
        assert list(pieces) == []  # the tiny model has no tokenizer: no text
        assert pieces.completion is not None
        assert pieces.completion.token_ids == expected
        assert len(when_idle(engine).workers) == 2
        assert "open" in repr(engine)
    with pytest.raises(EngineClosedError):
        engine.generate([prompt])


@engine_test()
async def test_a_completion_says_what_happened(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
    async with tiny(client) as engine:
        done: Completion = await engine.submit(prompt_ids(70), SamplingParams(max_new_tokens=5, ignore_eos=True))
        assert done.finish_reason == "length"
        assert len(done.token_ids) == 5
        assert done.prompt_tokens == 70
        assert done.error is None
        assert done.timings.prefill > 0
        assert done.timings.decode > 0
        assert [(span.start, span.stop) for span in done.placement] == [(0, 74)]


@engine_test()
async def test_the_models_end_of_sequence_token_ends_the_answer_and_is_not_part_of_it(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    prompt = prompt_ids(20)
    tokens = reference_generate(model_dir("llama-gqa"), [prompt], 12)[0].tokens
    end = tokens[-1]
    async with tiny(client) as engine:
        for worker in workers:
            model = worker.plugins["distkv"].engines[engine.id].model
            object.__setattr__(model, "eos_token_ids", frozenset({end}))
        done = await engine.submit(prompt, SamplingParams(max_new_tokens=30))
        assert done.finish_reason == "stop"
        assert list(done.token_ids) == tokens[: tokens.index(end)]
        done = await engine.submit(prompt, SamplingParams(max_new_tokens=12, ignore_eos=True))
        assert list(done.token_ids) == tokens


@engine_test()
async def test_a_cancelled_request_frees_its_blocks_while_others_go_on(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    async with tiny(client, window_steps=4) as engine:
        keeps = engine.submit(prompt_ids(30, seed=1), SamplingParams(max_new_tokens=40, ignore_eos=True))
        decoding, waiting = engine.submit(prompt_ids(40), LONG), engine.submit(prompt_ids(2000), LONG)
        while not any(one.generated_tokens for one in (await engine.status()).sequences.values()):
            assert not decoding.done()
            await asyncio.sleep(0.02)
        assert decoding.cancel()
        assert waiting.cancel()
        assert decoding.cancelled()
        with pytest.raises((CancelledError, asyncio.CancelledError)):
            await decoding
        assert (await keeps).finish_reason == "length"
        pools = [worker.plugins["distkv"].engines[engine.id].runtime.pool for worker in workers]
        for _ in range(200):  # the ledger is first, the pools follow when the message arrives
            status = await engine.status()
            ledger = [status.workers[worker.address] for worker in workers]
            left = [pool.used_blocks - one.blocks.cached for pool, one in zip(pools, ledger, strict=True)]
            if not any(left) and not any(one.used_blocks for one in ledger):
                break
            await asyncio.sleep(0.05)
        assert status.sequences == {}
        assert not any(one.used_blocks for one in ledger)
        assert not any(left)
        assert sum(one.blocks.cached for one in ledger) == (30 + 39) // 8, "of the one that was not cancelled"


@engine_test()
async def test_status_shows_where_a_running_sequence_lies(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    async with tiny(client, kv_memory="1 MiB", window_steps=4) as engine:
        running = engine.submit(prompt_ids(150), SamplingParams(max_new_tokens=500, ignore_eos=True))
        status = await engine.status()
        while not status.sequences or not status.sequences[0].generated_tokens:
            assert not running.done()
            await asyncio.sleep(0.02)
            status = await engine.status()
        one = status.sequences[0]
        assert one.state == "decode"
        assert len(one.placement) > 1
        assert one.home == one.placement[-1].worker
        assert sum(worker.lent_blocks for worker in status.workers.values()) > 0
        assert status.debts
        running.cancel()


@engine_test()
async def test_who_reads_along_gets_many_short_windows_and_who_does_not_few_long_ones(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    prompt, params = prompt_ids(40), SamplingParams(max_new_tokens=150, ignore_eos=True)
    settings = {"window_stream_seconds": 0.01, "window_seconds": 60, "window_scheduler_share": 100}
    async with tiny(client, **settings) as engine:
        alone = await engine.submit(prompt, params)
        status = await engine.status()
        assert status.totals["windows"] == 1
        assert max(worker.window_seconds for worker in status.workers.values()) == 60
        pieces = engine.stream(prompt, params)
        async for _ in pieces:
            pass
        assert pieces.completion is not None
        assert pieces.completion.token_ids == alone.token_ids
        status = await engine.status()
        assert status.totals["windows"] > 5
        assert status.scheduler.task_seconds > 0


@engine_test()
async def test_two_engines_share_a_cluster(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
    prompt = prompt_ids(40)
    params = SamplingParams(max_new_tokens=10, ignore_eos=True)
    expected = [tuple(reference_generate(model_dir(name), [prompt], 10)[0].tokens) for name in ("llama-gqa", "qwen2")]
    async with tiny(client) as one, Engine(client, str(model_dir("qwen2")), **TINY) as two:
        answers = await asyncio.gather(one.generate([prompt] * 3, params), two.generate([prompt] * 3, params))
        assert [[done.token_ids for done in each] for each in answers] == [[each] * 3 for each in expected]
        await one.close()
        assert (await two.generate([prompt], params))[0].token_ids == expected[1]


@engine_test()
async def test_an_engine_dies_with_its_client(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
    async with Client(scheduler.address, asynchronous=True) as other:
        engine = await tiny(other, window_steps=4)
        engine.submit(prompt_ids(40), LONG)
        await asyncio.sleep(0.3)
        assert scheduler.plugins["distkv"].engines
    for _ in range(200):
        if not scheduler.plugins["distkv"].engines:
            break
        await asyncio.sleep(0.05)
    assert not scheduler.plugins["distkv"].engines


@engine_test()
async def test_closing_an_engine_cancels_what_is_running(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    engine = await tiny(client, window_steps=4)
    running = engine.submit(prompt_ids(40), LONG)
    await asyncio.sleep(0.3)
    await engine.close()
    assert running.cancelled()
    await engine.close()


@engine_test(workers=1)
async def test_a_worker_that_joins_takes_requests(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
    async with tiny(client, kv_memory="256 KiB") as engine, Worker(scheduler.address, nthreads=1):
        while len((await engine.status()).workers) < 2:
            await asyncio.sleep(0.05)
        prompt = prompt_ids(110)
        done = await engine.submit(prompt, SamplingParams(max_new_tokens=6, ignore_eos=True))
        assert len(done.placement) == 2
        assert list(done.token_ids) == reference_generate(model_dir("llama-gqa"), [prompt], 6)[0].tokens


@engine_test(workers=2)
async def test_scaling_down_spares_workers_that_hold_blocks(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    async with tiny(client, window_steps=4) as engine:
        running = engine.submit(prompt_ids(40), SamplingParams(max_new_tokens=900, ignore_eos=True))
        while not (sequences := (await engine.status()).sequences) or not sequences[0].home:
            await asyncio.sleep(0.02)
        home = sequences[0].home
        states = list(scheduler.workers.values())
        spared = scheduler.plugins["distkv"].valid_workers_downscaling(scheduler, states)
        assert {state.address for state in spared} == {worker.address for worker in workers} - {home}
        assert home not in scheduler.workers_to_close(n=1)
        running.cancel()


@engine_test()
async def test_after_many_requests_nothing_has_grown(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
    import threading

    import psutil

    params = SamplingParams(max_new_tokens=3, ignore_eos=True)
    async with tiny(client, kv_memory="256 KiB") as engine:

        def resources() -> tuple[int, int, int]:
            tables = sum(worker.plugins["distkv"].engines[engine.id].runtime.pool.used_blocks for worker in workers)
            ledger = scheduler.plugins["distkv"].engines[engine.id].life.ledger
            tables -= sum(account.cached for account in ledger.workers.values())
            threads = [one for one in threading.enumerate() if not one.name.startswith(POOLS)]
            return tables, len(threads), len(psutil.Process().net_connections("all"))

        def tasks() -> list[object]:
            known = [key for key in scheduler.tasks if str(key).startswith(("prefill-", "decode-", "attend-"))]
            return [*scheduler.plugins["distkv"].dispatcher.submitter._tasks, *known]

        await engine.generate([prompt_ids(150, seed=seed) for seed in range(4)], params)
        await asyncio.sleep(0.5)
        before = resources()
        channels = 2 * len(workers) * (len(workers) - 1)  # sockets, once every worker has held for every other
        for _ in range(5):
            done = await engine.generate([prompt_ids(150, seed=seed) for seed in range(10)], params)
            assert all(one.finish_reason == "length" for one in done)
        for _ in range(100):
            after = resources()
            if not after[0] and not tasks():  # the last attend task of a gang may end a moment later
                break
            await asyncio.sleep(0.1)
        assert after[0] == 0
        assert after[1] <= before[1]
        assert after[2] <= before[2] + channels
        assert not (await until_idle(engine)).debts
        assert not tasks()
