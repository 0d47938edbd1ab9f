"""Handles on an engine that another client opened: they end their own requests and documents only."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
from distributed import Client, LocalCluster, Scheduler, Worker, secede

from distkv_dask import ClusterError, Engine, EngineClosedError, SamplingParams
from tests._cluster import PROTOCOL, engine_test
from tests._models import model_dir, prompt_ids, reference_generate

TINY: dict[str, Any] = {"dtype": "float32", "kv_memory": "8 MiB", "block_tokens": 8}
FEW = SamplingParams(max_new_tokens=8, ignore_eos=True)
LONG = SamplingParams(max_new_tokens=900, ignore_eos=True)
PROMPT = prompt_ids(60, seed=6)


def expected() -> list[int]:
    return reference_generate(model_dir("llama-gqa"), [PROMPT], 8)[0].tokens


def tiny(client: Client) -> Engine:
    return Engine(client, str(model_dir("llama-gqa")), **TINY)


async def settled(engine: Engine, requests: int) -> None:
    """Wait until this many requests and documents are left."""
    for _ in range(200):
        if len((await engine.status()).sequences) == requests:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(await engine.status())


@engine_test(workers=2)
async def test_a_handle_answers_alike_and_its_end_is_nobody_elses(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    async with tiny(client) as engine:
        own = await engine.ingest(PROMPT, name="own")
        async with Engine.attach(engine.id, client) as other, Engine.attach(None, client) as third:
            assert other.id == engine.id
            assert (other.config, other.dtype, other.model) == (engine.config, engine.dtype, engine.model)
            assert list((await other.generate([PROMPT], FEW))[0].token_ids) == expected()
            document = await other.ingest(PROMPT)
            assert document.number in (await engine.status()).sequences
            assert list(engine.documents()) == ["own"]
            kept = await third.ingest(PROMPT, name="kept")
            running = other.submit(PROMPT, LONG)
            await other.close()
            assert running.cancelled()
            await settled(engine, 2)
            assert list((await kept.ask(PROMPT[:5], FEW)).token_ids)
            with pytest.raises(EngineClosedError):
                other.submit(PROMPT)
        await settled(engine, 1)
        assert list((await own.ask(PROMPT[:5], FEW)).token_ids)
        assert list((await engine.generate([PROMPT], FEW))[0].token_ids) == expected()
        last = Engine.attach(engine.id, client)
        await last
        waiting = last.submit(PROMPT, LONG)
        await last._session.conversation.flushed()
    with pytest.raises(EngineClosedError):
        await waiting
    await last.close()


@engine_test(workers=1)
async def test_what_cannot_be_attached_to_is_a_clear_error(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    with pytest.raises(ClusterError, match="no engine is open"):
        await Engine.attach(client=client)
    async with tiny(client) as engine, tiny(client) as another:
        with pytest.raises(ClusterError, match=f"several engines.*({engine.id}|{another.id})"):
            await Engine.attach(client=client)
        with pytest.raises(TypeError, match=r"Engine\.attach"):
            pickle.dumps(engine)
    with pytest.raises(EngineClosedError, match=engine.id):
        await Engine.attach(engine.id, client)


def ask(engine_id: str, prompt: list[int]) -> list[int]:
    """A task that sends a request."""
    secede()
    with Engine.attach(engine_id) as engine:
        return list(engine.generate([prompt], FEW)[0].token_ids)


@engine_test(workers=2)
async def test_more_tasks_than_threads_ask_the_engine_of_their_workers(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    async with tiny(client) as engine:
        tasks = [client.submit(ask, engine.id, PROMPT, pure=False) for _ in range(8)]
        assert await client.gather(tasks) == [expected()] * 8
        await settled(engine, 0)


@engine_test(workers=1)
async def test_a_client_that_is_still_being_connected_is_waited_for(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    async with tiny(client) as engine:
        another = Client(scheduler.address, asynchronous=True)  # as Dask hands a worker's client to its second task
        async with Engine.attach(engine.id, another) as handle:
            assert list((await handle.generate([PROMPT], FEW))[0].token_ids) == expected()
        await another.close()


def attach_at_once(engine_id: str) -> None:
    """A task that occupies its worker's thread."""
    Engine.attach(engine_id)


@engine_test(workers=1)
async def test_a_task_that_keeps_its_workers_thread_is_told_to_secede(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    async with tiny(client) as engine:
        with pytest.raises(ClusterError, match=r"distributed\.secede\(\)"):
            await client.submit(attach_at_once, engine.id, pure=False)
        await settled(engine, 0)


STRANGER = """
import sys, time
from distributed import Client
from distkv_dask import Engine, SamplingParams
with Client(sys.argv[1]) as client:
    engine = Engine.attach(sys.argv[2], client)
    engine.ingest(list(range(5, 65)))
    engine.submit(list(range(5, 65)), SamplingParams(max_new_tokens=900, ignore_eos=True))
    print("asked", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_of_its_handle_and_the_engine_goes_on() -> None:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, protocol=PROTOCOL, dashboard_address=None) as cluster,
        Client(cluster) as client,
        Engine(client, str(model_dir("llama-gqa")), window_steps=2, **TINY) as engine,
    ):
        command = [sys.executable, "-c", STRANGER, cluster.scheduler_address, engine.id]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                assert any("asked" in line for line in process.stdout)
                deadline = time.monotonic() + 30
                while len(engine.status().sequences) < 2:  # submit returns before the request has arrived
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
            finally:
                os.kill(process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while engine.status().sequences:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert list(engine.generate([PROMPT], FEW)[0].token_ids) == expected()
