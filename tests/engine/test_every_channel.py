"""Whatever carries queries and partials, on a cluster that speaks UCX itself too, tokens are those of one process."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
from distributed import Client, LocalCluster

from distkv_dask import Engine, SamplingParams
from tests._models import model_dir, prompt_ids, reference_generate

PROMPTS = [prompt_ids(150), prompt_ids(40, seed=1)]
PARAMS = SamplingParams(max_new_tokens=12, ignore_eos=True)
SMALL: dict[str, Any] = {"dtype": "float32", "kv_memory": "320 KiB", "block_tokens": 8, "prefill_chunk_tokens": 32}
OPENED = {"auto": "UnixChannel", "tcp": "TcpChannel", "unix": "UnixChannel", "ucx": "UcxChannel"}


@pytest.fixture(scope="module")
def client(request: pytest.FixtureRequest) -> Iterator[Client]:
    """Client of two worker processes, whose own comms go over each protocol in turn."""
    if request.param == "ucx" and find_spec("distributed_ucxx") is None:
        pytest.skip("distributed-ucxx is not installed")
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, protocol=request.param, dashboard_address=None, silence_logs=40
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.mark.parametrize(
    ("client", "channel"),
    [("tcp", "tcp"), ("tcp", "unix"), ("tcp", "ucx"), ("ucx", "auto"), ("ucx", "ucx")],
    indirect=["client"],
)
def test_tokens_are_those_of_one_process_whatever_carries_the_partials(client: Client, channel: str) -> None:
    if channel == "ucx" and find_spec("ucxx") is None:
        pytest.skip("ucxx is not installed")
    with Engine(client, str(model_dir("llama-gqa")), channel=channel, **SMALL) as engine:
        done = engine.generate(PROMPTS, PARAMS)
        assert len(done[0].placement) == 2
        expected = reference_generate(model_dir("llama-gqa"), PROMPTS, 12)
        assert [list(one.token_ids) for one in done] == [one.tokens for one in expected]
        for worker in engine.status()["workers"].values():
            assert channel in worker["channels"]
            assert channel != "auto" or "ucx to others" in worker["channels"]
        found = client.run(_kinds, engine.id)
        assert set().union(*found.values()) == {OPENED[channel]}


def _kinds(engine: str, dask_worker: Any) -> set[str]:
    cache = dask_worker.plugins["distkv"].engines[engine].runtime._cache
    return {type(one).__name__ for one in cache._idle.values()}
