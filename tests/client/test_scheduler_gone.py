"""The Dask scheduler's process is killed or frozen: every call of the client ends at once, or within its limit."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

from distkv_dask import Engine, EngineClosedError, SamplingParams
from distkv_dask.client.session import reach
from tests._forked_workers import Forked
from tests._models import text_model_dir
from tests._processes import freeze

pytestmark = pytest.mark.slow

TINY: dict[str, Any] = {"dtype": "float32", "kv_memory": "8 MiB", "block_tokens": 8, "window_steps": 2}
LONG = SamplingParams(max_new_tokens=900, ignore_eos=True)
SECONDS = 10.0
"""A call that ends later waits for Dask's own client, which gives up after 30 s."""


@contextmanager
def cluster(folder: Path) -> Iterator[tuple[str, Forked]]:
    """A scheduler and a worker, each a process: the scheduler's file and process."""
    where = str(folder / "scheduler.json")
    local = ["--host", "127.0.0.1", "--no-dashboard", "--scheduler-file", where]
    commands = [["scheduler", "--port", "0", *local], ["worker", "--nthreads", "1", "--no-nanny", *local]]
    processes = [Forked("dask", *command) for command in commands]
    try:
        yield where, processes[0]
    finally:
        for process in processes:
            process.kill()
            process.wait(30)


def in_time(call: Callable[..., Any], *arguments: Any) -> Any:
    """Result or error of a call; fails if the call takes too long."""
    ended: list[Any] = []

    def run() -> None:
        try:
            ended.append(call(*arguments))
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert ended, f"{call} still waits after {SECONDS} s"
    return ended[0]


def assert_refused(call: Callable[..., Any], *arguments: Any, words: Sequence[str] = ("lost", "closed")) -> None:
    """Check that a call ends in time with an error that says what happened and what to do."""
    error = in_time(call, *arguments)
    assert isinstance(error, EngineClosedError), repr(error)
    assert "scheduler" in str(error)
    assert any(word in str(error) for word in words), str(error)
    assert "Error()" not in str(error)


def test_after_the_schedulers_death_every_call_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "PATIENCE", 2.0)  # time in which a new engine lets the client reconnect
    with cluster(tmp_path) as (where, scheduler):
        client = Client(scheduler_file=where, timeout=60)
        client.wait_for_workers(1, timeout=60)
        engine = Engine(client, str(text_model_dir()), **TINY)
        other = Engine.attach(engine.id, client)
        documents = [engine.ingest("Gravity pulls. " * 20), other.ingest("Light bends. " * 20)]
        chat = documents[0].chat()
        chat.ask("Who?", SamplingParams(max_new_tokens=4))
        running = engine.submit("Who?", LONG)
        stream = iter(other.stream("What?", LONG))
        next(stream)
        (tmp_path / "in.jsonl").write_text('{"text": "Gravity pulls."}')
        batch = partial(engine.process, tmp_path / "in.jsonl", question="Who?", sampling=LONG)
        with ThreadPoolExecutor(1) as pool:
            before = len(engine.status().sequences)
            batching = pool.submit(batch, out=tmp_path / "begun")
            while len(engine.status().sequences) == before:
                assert not batching.done(), batching.exception()
                time.sleep(0.02)
            scheduler.kill()
            assert_refused(batching.result)
        assert_refused(running.result)
        assert_refused(list, stream)
        for one in (engine, other):
            assert_refused(one.generate, ["Why?"])
            for call in (one.submit, one.stream, one.graph, one.ingest, one.load):
                assert_refused(call, "Why?")
            for call in (one.status, one.documents):
                assert_refused(call)
        assert not engine.is_open
        for document in documents:
            assert_refused(document.ask, "Why?")
            assert_refused(document.save, tmp_path / "saved")
        assert_refused(chat.ask, "Why?")
        assert_refused(partial(Engine, client, str(text_model_dir()), **TINY))
        assert_refused(Engine.attach, engine.id, client)
        assert_refused(partial(batch, out=tmp_path / "out"))
        assert in_time(chat.close) is None
        for document in documents:
            assert in_time(document.release) is None
            assert in_time(document.__exit__, None, None, None) is None
        for one in (other, engine):
            assert in_time(one.close) is None
            assert in_time(one.close) is None
        client.close(1)
        assert in_time(chat.close) is None
        assert in_time(documents[0].release) is None


def test_after_the_clients_end_every_call_ends_too(tmp_path: Path) -> None:
    with cluster(tmp_path) as (where, _):
        client = Client(scheduler_file=where, timeout=60)
        client.wait_for_workers(1, timeout=60)
        engine = Engine(client, str(text_model_dir()), **TINY)
        document = engine.ingest("Gravity pulls. " * 20)
        running = engine.submit("Who?", LONG)
        client.close()
        assert isinstance(in_time(running.result), EngineClosedError | CancelledError)
        for call in (engine.submit, engine.ingest, engine.load, engine.graph, document.ask, document.save):
            assert_refused(call, "Why?", words=["client is closed"])
        assert_refused(engine.status, words=["client is closed"])
        assert_refused(partial(Engine, client, str(text_model_dir()), **TINY), words=["client is closed"])
        assert in_time(document.release) is None
        assert in_time(engine.close) is None


def test_asynchronous_calls_end_at_once_too(tmp_path: Path) -> None:
    async def run(where: str, scheduler: Forked) -> None:
        async with Client(scheduler_file=where, timeout=60, asynchronous=True) as client:
            await client.wait_for_workers(1, timeout=60)
            engine = await Engine(client, str(text_model_dir()), **TINY)
            document = await engine.ingest("Gravity pulls. " * 20)
            running = engine.submit("Who?", LONG)
            asking = asyncio.ensure_future(document.ask(["Who?"] * 3, LONG))
            await asyncio.sleep(0.5)
            scheduler.kill()
            with pytest.raises(EngineClosedError, match="lost"):
                await asyncio.wait_for(running, SECONDS)
            assert all("lost" in one.error for one in await asyncio.wait_for(asking, SECONDS))
            with pytest.raises(EngineClosedError, match="lost"):
                await asyncio.wait_for(engine.status(), SECONDS)
            await asyncio.wait_for(document.release(), SECONDS)
            await asyncio.wait_for(engine.close(), SECONDS)
        await document.release()
        await engine.close()

    with cluster(tmp_path) as (where, scheduler):
        asyncio.run(run(where, scheduler))


def test_a_frozen_scheduler_is_given_up_within_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster(tmp_path) as (where, scheduler):
        client = Client(scheduler_file=where, timeout=60)
        client.wait_for_workers(1, timeout=60)
        engine = Engine(client, str(text_model_dir()), **TINY)
        document = engine.ingest("Gravity pulls. " * 20)
        running = engine.submit("Who?", LONG)
        monkeypatch.setattr(reach, "PATIENCE", 1.0)
        freeze(scheduler.pid)
        try:
            assert_refused(engine.status, words=["not answered"])
            assert_refused(running.result, words=["not answered"])
            assert_refused(document.ask, "Why?", words=["not answered"])
            assert in_time(document.release) is None
            assert in_time(engine.close) is None
        finally:
            os.kill(scheduler.pid, signal.SIGCONT)
        client.close(1)


def test_a_scheduler_that_was_restarted_is_another_one(tmp_path: Path) -> None:
    with cluster(tmp_path) as (where, scheduler):
        client = Client(scheduler_file=where, timeout=60)
        client.wait_for_workers(1, timeout=60)
        engine = Engine(client, str(text_model_dir()), **TINY)
        running = engine.submit("Who?", LONG)
        port = client.scheduler.address.rpartition(":")[2]
        scheduler.kill()
        process = Forked("dask", "scheduler", "--host", "127.0.0.1", "--no-dashboard", "--port", port)
        try:
            assert_refused(running.result, words=["lost", "restarted"])
            assert_refused(engine.status, words=["lost", "restarted"])
            assert in_time(engine.close) is None
            client.close(1)
        finally:
            process.kill()
            process.wait(30)
