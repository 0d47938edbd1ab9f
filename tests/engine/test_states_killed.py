"""Killed processes that held what only homes have, or other blocks of such a sequence: the right answer still."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
from distributed import Client, LocalCluster

from distkv_dask import Engine, SamplingParams
from tests._models import model_dir, prompt_ids, reference_generate
from tests._splits import force_split
from tests._thorough import some_of

pytestmark = pytest.mark.slow

PROMPT, NEW = prompt_ids(200, seed=3), 150

FAMILIES = ("gemma2", "gpt-oss", "qwen3-next", "granite4-h", "lfm2")
BY_DEFAULT = {("gemma2", "holder"), ("qwen3-next", "home")}
"""A model with windows and one with recurrent layers, and the process that is killed."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Three worker processes with nannies, which replace killed ones; their scheduler is in this process."""
    with LocalCluster(n_workers=3, threads_per_worker=1, dashboard_address=None) as cluster:
        yield cluster


CASES = [(family, victim) for family in FAMILIES for victim in ("holder", "home")]


@pytest.mark.parametrize(("family", "victim"), some_of(CASES, *BY_DEFAULT))
def test_a_killed_worker_costs_no_token(
    cluster: LocalCluster, family: str, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = reference_generate(model_dir(family), [PROMPT], NEW)[0].tokens
    settings = {"dtype": "float32", "kv_memory": "8 MiB", "block_tokens": 8, "prefill_chunk_tokens": 32}
    with Client(cluster) as client, Engine(client, str(model_dir(family)), window_steps=4, **settings) as engine:
        client.wait_for_workers(3)
        with monkeypatch.context() as patched:
            force_split([(0, 80), (1, 80), (2, None)], patched)
            running = engine.submit(PROMPT, SamplingParams(max_new_tokens=NEW, ignore_eos=True))
            deadline = time.monotonic() + 60
            while not any(one.generated_tokens > 8 for one in engine.status().sequences.values()):
                assert time.monotonic() < deadline
                time.sleep(0.01)
        (state,) = cluster.scheduler.plugins["distkv"].engines.values()
        placement = state.life.ledger.sequences[0].placement
        os.kill(client.run(os.getpid)[placement[-1 if victim == "home" else 1].worker], signal.SIGKILL)
        assert list(running.result(120).token_ids) == expected
        totals = engine.status().totals
        assert totals["repair_events"] == 1
        again = 200 if victim == "home" else 120  # a chunk ends at 80, where the lost span begins
        assert again <= totals["prefilled_tokens"] - 200 < again + NEW
