"""Races and failures between user, scheduler and workers: nothing hangs, nothing is left behind."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from distributed import Client, LocalCluster, Scheduler, Worker
from distributed.comm import Comm

from distkv_dask import ClusterError, DistKVError, Engine, EngineClosedError, InvalidRequestError, SamplingParams
from distkv_dask.client.session import reach
from distkv_dask.messages.client_calls import ClientCall
from tests._cluster import engine_test
from tests._models import model_dir, prompt_ids, reference_generate

TINY: dict[str, Any] = {"dtype": "float32", "kv_memory": "1 MiB", "block_tokens": 8, "prefill_chunk_tokens": 32}
LONG = SamplingParams(max_new_tokens=900, ignore_eos=True)
TWO = SamplingParams(max_new_tokens=2, ignore_eos=True)


def tiny(client: Client, **settings: Any) -> Engine:
    return Engine(client, str(model_dir("llama-gqa")), **(TINY | settings))


async def until_idle(engine: Engine) -> None:
    for _ in range(200):
        status = await engine.status()
        if not status.sequences and not any(one.used_blocks for one in status.workers.values()):
            return
        await asyncio.sleep(0.05)
    raise AssertionError(status)


@engine_test()
async def test_the_first_two_engines_of_a_cluster_may_open_at_once(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    one, two = await asyncio.gather(tiny(client), tiny(client))
    assert scheduler.extensions["distkv"] is scheduler.plugins["distkv"]
    for engine in (one, two):
        assert (await engine.generate([prompt_ids(30)], TWO))[0].finish_reason == "length"
        await engine.close()


@engine_test(workers=1)
async def test_a_worker_that_joins_while_an_engine_opens_opens_it_once(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    opening = asyncio.ensure_future(tiny(client))
    async with Worker(scheduler.address, nthreads=1) as late:
        engine = await opening
        while len((await engine.status()).workers) < 2:
            await asyncio.sleep(0.02)
        prompt = prompt_ids(400)  # 340 tokens fit on a worker
        done = await engine.generate([prompt] * 3, TWO)
        assert [list(one.token_ids) for one in done] == [
            reference_generate(model_dir("llama-gqa"), [prompt], 2)[0].tokens
        ] * 3
        assert late.status.name == "running"
        await engine.close()


@engine_test()
async def test_an_engine_whose_opening_is_interrupted_is_closed_everywhere(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    opening = asyncio.ensure_future(tiny(client))
    while not (manager := scheduler.plugins.get("distkv")) or not manager.engines:
        await asyncio.sleep(0.005)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    for _ in range(200):
        if not manager.engines and not any(worker.plugins["distkv"].engines for worker in workers):
            break
        await asyncio.sleep(0.05)
    assert not manager.engines


@engine_test()
async def test_requests_cancelled_at_once_do_not_live_on_in_the_cluster(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    async with tiny(client) as engine:
        running = [engine.submit(prompt_ids(300, seed=seed), LONG) for seed in range(20)]
        for one in running:
            one.cancel()
        await until_idle(engine)
        assert (await engine.generate([prompt_ids(9)], TWO))[0].finish_reason == "length"


@contextmanager
def without_answers(scheduler: Scheduler, late: float) -> Iterator[None]:
    """A network on which connections break that submit requests; what they carried arrives so much later."""
    submit = scheduler.handlers[ClientCall.SUBMIT]

    async def lossy(comm: Comm, **given: Any) -> Any:
        comm.abort()
        await asyncio.sleep(late)
        return submit(**given)

    scheduler.handlers[ClientCall.SUBMIT] = lossy
    try:
        yield
    finally:
        scheduler.handlers[ClientCall.SUBMIT] = submit


@pytest.mark.parametrize("late", [0.0, 0.5], ids=["with its answer lost", "after its connection broke"])
def test_a_request_that_failed_without_an_answer_does_not_live_on_in_the_cluster(
    late: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = reach._looks
    monkeypatch.setattr(reach, "_looks", lambda seconds: 0 if seconds == 1.0 else looks(seconds))  # it fails at once

    @engine_test(workers=1)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with tiny(client, kv_memory="8 MiB") as engine:
            with without_answers(scheduler, late), pytest.raises(ClusterError, match=r"got no answer .*: try again"):
                await (engine.ingest(prompt_ids(400)) if late else engine.submit(prompt_ids(20), LONG))
            await asyncio.sleep(late)
            await until_idle(engine)  # a document would stay
            assert late or (await engine.status()).totals["finished_cancelled"] == 1
            assert (await engine.generate([prompt_ids(9)], TWO))[0].finish_reason == "length"

    run()


@engine_test(workers=1)
async def test_a_document_that_is_there_stays_although_the_answer_to_its_call_was_lost(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    async with tiny(client) as engine:
        with without_answers(scheduler, 0.0):
            document = await engine.ingest(prompt_ids(40))
            await asyncio.sleep(2)  # until the call has failed
        assert document.number in (await engine.status()).sequences
        assert (await document.ask(prompt_ids(9), TWO)).finish_reason == "length"


@engine_test()
async def test_a_tokenizer_that_fails_fails_its_request_alone(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    async with tiny(client) as engine:
        good, bad = engine.submit(prompt_ids(20), TWO), engine.submit(prompt_ids(20), LONG)
        engine._session.conversation._requests[1]._stream.add = lambda tokens: [][0]  # type: ignore[method-assign]
        with pytest.raises(DistKVError, match="index"):
            await bad
        assert (await good).finish_reason == "length"
        await until_idle(engine)


@engine_test(workers=1)
async def test_one_prompt_given_as_several_is_refused_with_a_hint(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    async with tiny(client) as engine:
        for prompt in ([1, 2, 3], (1, 2, 3), [{"role": "user", "content": "hello"}]):
            with pytest.raises(InvalidRequestError, match=r"did you mean generate\(\[prompt\]\)"):
                await engine.generate(prompt)
        with pytest.raises(InvalidRequestError, match="SamplingParams"):
            engine.submit([1], {"max_new_tokens": 3})  # type: ignore[arg-type]
        done = await engine.generate(iter([[1, 2], [3]]), TWO)
        assert [one.finish_reason for one in done] == ["length", "length"]


@engine_test(workers=1)
async def test_a_stream_can_be_read_again_and_from_another_loop(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    async with tiny(client) as engine:
        engine.tokenizer.decode = lambda ids: "".join(chr(97 + one % 26) for one in ids)  # type: ignore[method-assign]
        pieces = engine.stream(prompt_ids(20), SamplingParams(max_new_tokens=20, ignore_eos=True))
        text = "".join([piece async for piece in pieces])
        assert len(text) == 20
        assert "".join([piece async for piece in pieces]) == text

        def elsewhere() -> str:
            async def read() -> str:
                return "".join([piece async for piece in pieces])

            return asyncio.run(read()) + "".join(pieces)

        assert await asyncio.to_thread(elsewhere) == text * 2
        assert pieces.completion is not None
        assert pieces.completion.text == text


def test_closing_an_engine_in_another_thread_ends_who_waits_for_it() -> None:
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        engine = tiny(client, kv_memory="8 MiB", window_steps=4)
        closing = threading.Timer(0.5, engine.close)
        closing.start()
        began = time.monotonic()
        done = engine.generate([prompt_ids(100)], SamplingParams(max_new_tokens=2000, ignore_eos=True))
        closing.join()
        assert done[0].finish_reason == "cancelled"
        assert time.monotonic() - began < 30
        client.close()
        engine.close()
        with pytest.raises(EngineClosedError):
            engine.submit([1])
