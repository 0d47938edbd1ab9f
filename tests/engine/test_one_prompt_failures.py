"""A prompt that all workers compute loses one of them, or its client: no token is lost, nothing is left behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from distributed import Client, LocalCluster

from distkv_dask import Engine, SamplingParams, SequenceStatus
from tests._cluster import PROTOCOL, client_of_all
from tests._models import model_dir, prompt_ids, reference_generate

pytestmark = pytest.mark.slow

TINY: dict[str, Any] = {"dtype": "float32", "block_tokens": 8, "prefill_chunk_tokens": 16, "kv_memory": "4 MiB"}
PROMPT = prompt_ids(1100)
SAMPLING = SamplingParams(max_new_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(n_workers=3, threads_per_worker=1, protocol=PROTOCOL, dashboard_address=None) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with client_of_all(cluster) as client:
        yield client


def begun(engine: Engine) -> SequenceStatus:
    """Wait until some of the prompt is computed."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for one in engine.status().sequences.values():
            if one.kv_tokens:
                return one
        time.sleep(0.005)  # each status costs the scheduler as much as a step
    raise AssertionError(engine.status())


@pytest.mark.parametrize(
    "victim", [pytest.param(0, id="first worker"), pytest.param(-1, id="home", marks=pytest.mark.thorough)]
)
def test_a_worker_killed_while_all_compute_a_prompt_costs_no_token(client: Client, victim: int) -> None:
    with Engine(client, str(model_dir("llama-gqa")), prefill_workers=3, **TINY) as engine:
        request = engine.submit(PROMPT, SAMPLING)
        worker = begun(engine).placement[victim].worker
        assert engine.status().totals["wavefront_events"] == 1
        os.kill(client.run(os.getpid, workers=[worker])[worker], signal.SIGKILL)
        expected = reference_generate(model_dir("llama-gqa"), [PROMPT], 8)[0].tokens
        assert list(request.result(120).token_ids) == expected


def test_a_prompt_that_all_compute_can_be_cancelled(client: Client) -> None:
    with Engine(client, str(model_dir("llama-gqa")), prefill_workers=3, prefix_cache=False, **TINY) as engine:
        request = engine.submit(PROMPT, SAMPLING)
        begun(engine)
        assert request.cancel()
        short = prompt_ids(20)
        expected = reference_generate(model_dir("llama-gqa"), [short], 8)[0].tokens
        assert list(engine.submit(short, SAMPLING).result(60).token_ids) == expected
        assert all(one.used_blocks == 0 for one in engine.status().workers.values())
