"""Cards that fail in the middle of a step, in worker processes: requests end as if nothing had happened."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from distributed import Client, LocalCluster, Worker
from emulated import break_card, run_out

from distkv_dask import Engine, SamplingParams
from tests._cluster import client_of_all, decoding
from tests._models import model_dir, prompt_ids, reference_generate

TINY: dict[str, Any] = {"dtype": "float32", "block_tokens": 8, "prefill_chunk_tokens": 32, "window_steps": 4}
MODEL = str(model_dir("llama-gqa"))
NEW = 80
PROMPT = prompt_ids(320)  # with its answer, on two of three workers with room for 340 tokens each
LONG = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
SHORT = SamplingParams(max_new_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Three processes with nannies and a card each."""
    with LocalCluster(n_workers=3, threads_per_worker=1, dashboard_address=None) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with client_of_all(cluster) as client:
        yield client


def until(found: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if answer := found():
            return answer
        time.sleep(0.05)
    raise AssertionError(what)


@pytest.mark.parametrize("victim", [pytest.param("home", marks=pytest.mark.thorough), "holder"])
def test_a_card_that_breaks_in_a_step_is_its_workers_death(client: Client, victim: str) -> None:
    expected = reference_generate(model_dir("llama-gqa"), [PROMPT], NEW)[0].tokens
    with Engine(client, MODEL, kv_memory="1 MiB", **TINY) as engine:
        running = engine.submit(PROMPT, LONG)
        placement = decoding(engine)[0].placement
        assert len(placement) == 2
        worker = placement[-1 if victim == "home" else 0].worker
        before = client.run(os.getpid, workers=[worker])[worker]
        client.run(break_card, 25, workers=[worker])
        assert list(running.result(240).token_ids) == expected
        assert engine.status().totals["repair_events"] == 1
        until(lambda: len(engine.status().workers) == 3, "no new worker came")
        assert before not in client.run(os.getpid).values(), "it is another process: nothing helps the old one"
        assert engine.submit(PROMPT[:20], SHORT).result(60).finish_reason == "length"


def occupy_home_lane(dask_worker: Worker) -> None:
    """Keep the home lane in a call that does not return, like calls to a card that hangs."""
    dask_worker.plugins["distkv"].lanes.home.submit(time.sleep, 10**6)


@pytest.mark.thorough
def test_a_call_that_never_returns_keeps_no_process_whose_card_is_lost(client: Client) -> None:
    expected = reference_generate(model_dir("llama-gqa"), [PROMPT], NEW)[0].tokens
    with Engine(client, MODEL, kv_memory="1 MiB", timeout_close=2, **TINY) as engine:
        running = engine.submit(PROMPT, LONG)
        worker = decoding(engine)[0].placement[0].worker
        before = client.run(os.getpid, workers=[worker])[worker]
        client.run(occupy_home_lane, workers=[worker])
        client.run(break_card, workers=[worker])
        assert list(running.result(240).token_ids) == expected
        until(lambda: len(engine.status().workers) == 3, "no new worker came")
        assert before not in client.run(os.getpid).values()


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("victim", "times"),
    [
        pytest.param("holder", 2, id="it passes"),
        pytest.param("home", 2, id="it passes at the home"),
        pytest.param("holder", 3, id="the engine is opened again"),
        pytest.param("home", 10**6, id="it stays"),
    ],
)
def test_a_card_without_memory_in_a_step_costs_a_request_no_token(client: Client, victim: str, times: int) -> None:
    """Temporary failures have no other effect; after others, the worker reopens its engine with memory that fits."""
    expected = reference_generate(model_dir("llama-gqa"), [PROMPT], NEW)[0].tokens
    with Engine(client, MODEL, kv_memory="1 MiB", **TINY) as engine:
        running = engine.submit(PROMPT, LONG)
        worker = decoding(engine)[0].placement[-1 if victim == "home" else 0].worker
        before = client.run(os.getpid)
        client.run(run_out, times, 25, workers=[worker])
        assert list(running.result(240).token_ids) == expected
        assert ("repair_events" in engine.status().totals) == (times > 2)
        client.run(run_out, 0, workers=[worker])
        assert (worker in engine.status().workers) == (times < 10**6)
        assert engine.submit(PROMPT[:20], SHORT).result(60).finish_reason == "length"
        assert client.run(os.getpid) == before
