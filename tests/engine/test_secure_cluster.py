"""On a cluster with certificates the workers' channels are encrypted with them, and answers stay the same."""

from __future__ import annotations

from typing import Any

import pytest
from distributed import Client, LocalCluster

from distkv_dask import Engine, SamplingParams
from tests._models import model_dir, prompt_ids, reference_generate

PROMPT = prompt_ids(150)
PARAMS = SamplingParams(max_new_tokens=8, ignore_eos=True)
SMALL: dict[str, Any] = {"dtype": "float32", "kv_memory": "256 KiB", "block_tokens": 8, "prefill_chunk_tokens": 32}


@pytest.fixture(scope="module")
def client():
    """Client of two worker processes that use TLS."""
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, security=True, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.mark.parametrize(
    ("channel", "rule", "opened"),
    [
        ("tcp", "tcp with the cluster's TLS (distkv.channel: tcp)", "TlsChannel"),
        ("auto", "unix to workers on the same machine, tcp with the cluster's TLS to others", "UnixChannel"),
    ],
)
def test_workers_of_a_tls_cluster_exchange_partials_and_say_how(
    client: Client, channel: str, rule: str, opened: str
) -> None:
    with Engine(client, str(model_dir("llama-gqa")), channel=channel, **SMALL) as engine:
        done = engine.generate([PROMPT], PARAMS)[0]
        assert len(done.placement) == 2
        assert list(done.token_ids) == reference_generate(model_dir("llama-gqa"), [PROMPT], 8)[0].tokens
        workers = engine.status().workers
        assert all(address.startswith("tls://") for address in workers)
        assert all(one.channels.startswith(rule) for one in workers.values())

        found = client.run(_kinds, engine.id)
        assert set().union(*found.values()) == {opened}


def _kinds(engine: str, dask_worker: Any) -> set[str]:
    cache = dask_worker.plugins["distkv"].engines[engine].runtime.channels
    return {type(one).__name__ for one in cache._idle.values()}
