"""Tokens are those of one process on every kind of channel, also on clusters that use UCX themselves.

Clusters of several processes run in a separate process, because Dask's UCX comms leave an event loop behind that polls
forever.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster, Scheduler, Worker

from distkv_dask import Completion, Engine, EngineStatus, SamplingParams
from tests._cluster import about_the_host, engine_test
from tests._forked_workers import fork_workers
from tests._models import model_dir, prompt_ids, reference_generate

ROOT = Path(__file__).resolve().parent.parent.parent
PROMPTS = [prompt_ids(150), prompt_ids(40, seed=1)]
PARAMS = SamplingParams(max_new_tokens=12, ignore_eos=True)
SMALL: dict[str, Any] = {"dtype": "float32", "kv_memory": "320 KiB", "block_tokens": 8, "prefill_chunk_tokens": 32}
OPENED = {"auto": "UnixChannel", "tcp": "TcpChannel", "unix": "UnixChannel", "ucx": "UcxChannel"}


def assert_exact(channel: str, found: dict[str, Any]) -> None:
    assert found["tokens"] == [one.tokens for one in reference_generate(model_dir("llama-gqa"), PROMPTS, 12)]
    assert found["workers"] == 2
    assert found["opened"] == [OPENED[channel]]
    for told in found["told"]:
        assert channel in told
        assert channel != "auto" or "ucx to others" in told


@about_the_host("partials of two cards travel alike")
@pytest.mark.parametrize("channel", ["tcp", "unix"])
def test_tokens_of_workers_in_one_process_are_those_without_channels(channel: str) -> None:
    @engine_test(workers=2)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with Engine(client, str(model_dir("llama-gqa")), channel=channel, **SMALL) as engine:
            done = await engine.generate(PROMPTS, PARAMS)
            opened = await client.run(kinds, engine.id)
            assert_exact(channel, described(done, await engine.status(), opened))

    run()


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize(("protocol", "channels"), [("tcp", ["tcp", "unix", "ucx"]), ("ucx", ["auto", "ucx"])])
def test_tokens_are_those_of_one_process_whatever_carries_the_partials(
    protocol: str, channels: list[str], tmp_path: Path
) -> None:
    if find_spec("ucxx") is None or find_spec("distributed_ucxx") is None:
        if protocol == "ucx":
            pytest.skip("distributed-ucxx is not installed")
        channels = [one for one in channels if one != "ucx"]
    command = [
        sys.executable,
        "-m",
        "tests.engine.test_every_channel",
        str(model_dir("llama-gqa")),
        str(tmp_path / "found.json"),  # not its output, because UCX also writes there
        protocol,
        *channels,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    for channel in channels:
        assert_exact(channel, found[channel])


def answers(client: Client, model: str, channel: str) -> dict[str, Any]:
    """Tokens over one kind of channel, and the kind that the engine reports."""
    with Engine(client, model, channel=channel, **SMALL) as engine:
        done = engine.generate(PROMPTS, PARAMS)
        return described(done, engine.status(), client.run(kinds, engine.id))


def described(done: Sequence[Completion], status: EngineStatus, opened: Mapping[str, set[str]]) -> dict[str, Any]:
    return {
        "tokens": [list(one.token_ids) for one in done],
        "workers": len(done[0].placement),
        "told": [worker.channels for worker in status.workers.values()],
        "opened": sorted(set().union(*opened.values())),
    }


def kinds(engine: str, dask_worker: Any) -> set[str]:
    """Kinds of channels that a worker has opened."""
    cache = dask_worker.plugins["distkv"].engines[engine].runtime.channels
    return {type(one).__name__ for one in cache._idle.values()}


def main(model: str, out: str, protocol: str, channels: list[str]) -> None:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, protocol=protocol, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        found = {channel: answers(client, model, channel) for channel in channels}
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    fork_workers()
    main(*sys.argv[1:4], sys.argv[4:])
