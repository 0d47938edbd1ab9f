"""Real processes killed and frozen during requests: the same tokens or a clear error, and the engine continues."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask.config
import pytest
from distributed import Client, LocalCluster

from distkv_dask import Engine, EngineClosedError, SamplingParams
from tests._cluster import PROTOCOL, client_of_all, decoding
from tests._forked_workers import Forked
from tests._models import model_dir, prompt_ids, reference_generate
from tests._processes import freeze

pytestmark = pytest.mark.slow

# Windows are short, so that a long request is seen decoding before it ends on any machine.
TINY: dict[str, Any] = {"dtype": "float32", "block_tokens": 8, "prefill_chunk_tokens": 64, "window_steps": 4}
NEW = 240
WIDE = prompt_ids(1200 - NEW)
LONG = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
SHORT = SamplingParams(max_new_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Three worker processes with nannies, which replace killed ones."""
    with LocalCluster(n_workers=3, threads_per_worker=1, protocol=PROTOCOL, dashboard_address=None) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with client_of_all(cluster) as client:
        yield client


def pid(client: Client, worker: str) -> int:
    return client.run(os.getpid, workers=[worker])[worker]


@pytest.mark.parametrize(
    ("victim", "family"),
    [("holder", "llama-gqa"), ("home", "gpt-oss"), pytest.param("home", "llama-gqa", marks=pytest.mark.thorough)],
)
def test_a_killed_worker_costs_a_request_no_token(client: Client, victim: str, family: str) -> None:
    prompt = prompt_ids(20, seed=9)
    memory = "1280 KiB" if family == "gpt-oss" else "2 MiB"  # 680 tokens a worker; windows are at homes
    with Engine(client, str(model_dir(family)), kv_memory=memory, **TINY) as engine:
        wide = engine.submit(WIDE, LONG)
        sequences = decoding(engine)
        span = sequences[0].placement[-1 if victim == "home" else 0]
        assert len(sequences[0].placement) == 2
        os.kill(pid(client, span.worker), signal.SIGKILL)
        expected = reference_generate(model_dir(family), [prompt], 8)[0].tokens
        assert list(engine.submit(prompt, SHORT).result(60).token_ids) == expected
        assert list(wide.result(120).token_ids) == reference_generate(model_dir(family), [WIDE], NEW)[0].tokens
        assert engine.status().totals["repair_events"] == 1
        deadline = time.monotonic() + 60  # the nanny's new worker joins the engine
        while len(engine.status().workers) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert [list(one.token_ids) for one in engine.generate([prompt] * 6, SHORT)] == [expected] * 6
        assert all(one.used_blocks == 0 for one in engine.status().workers.values())


@pytest.mark.parametrize("victim", ["home", pytest.param("holder", marks=pytest.mark.thorough)])
def test_a_killed_worker_costs_a_request_by_layer_no_token(client: Client, victim: str) -> None:
    prompt, new = prompt_ids(700), 40  # on two of three workers of 680 tokens
    expected = reference_generate(model_dir("llama-gqa"), [prompt], new)[0].tokens
    with Engine(client, str(model_dir("llama-gqa")), kv_memory="2 MiB", granularity="layer", **TINY) as engine:
        wide = engine.submit(prompt, SamplingParams(max_new_tokens=new, ignore_eos=True))
        placement = decoding(engine)[0].placement
        assert len(placement) == 2
        os.kill(pid(client, placement[-1 if victim == "home" else 0].worker), signal.SIGKILL)
        assert list(wide.result(120).token_ids) == expected
        assert engine.status().totals["repair_events"] == 1
        assert all(one.used_blocks == 0 for one in engine.status().workers.values())


def test_what_was_drawn_and_streamed_before_a_worker_died_is_drawn_and_streamed_once(client: Client) -> None:
    drawn = SamplingParams(max_new_tokens=NEW, ignore_eos=True, temperature=1.0, seed=3, repetition_penalty=1.2)
    with Engine(client, str(model_dir("llama-gqa")), kv_memory="2 MiB", **TINY) as engine:
        undisturbed = engine.submit(WIDE, drawn).result(120)
        pieces = engine.stream(WIDE, drawn)
        (sequence,) = decoding(engine).values()
        os.kill(pid(client, sequence.placement[0].worker), signal.SIGKILL)
        assert "".join(pieces) == undisturbed.text
        assert engine.status().totals["repair_events"] == 1


def test_requests_that_share_a_gang_with_a_killed_holder_go_on_unchanged(client: Client) -> None:
    with Engine(client, str(model_dir("llama-gqa")), kv_memory="2 MiB", **TINY) as engine:
        wide = engine.submit(WIDE, LONG)  # home and most of it on one worker, the rest on another
        placement = decoding(engine)[0].placement
        home, holder = placement[-1].worker, placement[0].worker
        prompt, new = prompt_ids(30, seed=5), 150
        others = [engine.submit(prompt, SamplingParams(max_new_tokens=new, ignore_eos=True)) for _ in range(2)]
        sequences = decoding(engine)
        assert holder not in {one.home for number, one in sequences.items() if number}
        os.kill(pid(client, holder), signal.SIGKILL)
        expected = reference_generate(model_dir("llama-gqa"), [prompt], new)[0].tokens
        assert [list(one.result(60).token_ids) for one in others] == [expected] * 2
        assert list(wide.result(120).token_ids) == reference_generate(model_dir("llama-gqa"), [WIDE], NEW)[0].tokens
        assert home in engine.status().workers


def test_a_frozen_holder_is_noticed_by_the_receive_time_limit(client: Client) -> None:
    settings = TINY | {"timeout_receive": 1, "timeout_start": 2}
    with Engine(client, str(model_dir("llama-gqa")), kv_memory="2 MiB", **settings) as engine:
        wide = engine.submit(WIDE, LONG)
        holder = decoding(engine)[0].placement[0].worker
        process = pid(client, holder)
        freeze(process)
        try:
            with pytest.raises(Exception, match=r"distkv\.timeouts|silent|did not") as caught:
                wide.result(60)
            assert type(caught.value).__module__ == "distkv_dask.errors"
        finally:
            os.kill(process, signal.SIGCONT)
        assert engine.submit(prompt_ids(10), SHORT).result(60).finish_reason == "length"


def test_a_holder_that_freezes_between_windows_is_noticed_by_dasks_own_limit() -> None:
    with (
        dask.config.set({"distributed.scheduler.worker-ttl": "5s"}),
        LocalCluster(n_workers=2, threads_per_worker=1, protocol=PROTOCOL, dashboard_address=None) as cluster,
        Client(cluster) as client,
        Engine(client, str(model_dir("llama-gqa")), kv_memory="2 MiB", block_tokens=8) as engine,
    ):
        first = engine.submit(prompt_ids(900), SHORT).result(60)
        holder = first.placement[0].worker
        process = pid(client, holder)
        freeze(process)
        again = engine.submit(prompt_ids(900), SHORT)  # distkv.timeouts.start is five minutes
        assert again.result(120).token_ids == first.token_ids  # once the nanny has replaced the frozen worker
        assert engine.status().totals["repair_events"] == 1
        assert engine.submit(prompt_ids(10), SHORT).result(60).finish_reason == "length"


def test_a_scheduler_that_dies_ends_requests_with_a_clear_error(tmp_path: Path) -> None:
    where = str(tmp_path / "scheduler.json")
    local = ["--host", "127.0.0.1", "--no-dashboard"]
    commands = [["scheduler", "--port", "0", *local], ["worker", "--nthreads", "1", *local]]
    processes = [Forked("dask", *command, "--scheduler-file", where) for command in commands]
    try:
        with Client(scheduler_file=where, timeout=60) as client:
            client.wait_for_workers(1, timeout=60)
            engine = Engine(client, str(model_dir("llama-gqa")), kv_memory="8 MiB", **TINY)
            running = engine.submit(prompt_ids(50), LONG)
            decoding(engine)
            processes[0].kill()
            with pytest.raises(EngineClosedError, match="scheduler"):
                running.result(30)
            with pytest.raises(EngineClosedError):
                engine.submit([1])
    finally:
        for process in processes:
            process.kill()
            process.wait(30)
