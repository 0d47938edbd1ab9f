"""An engine measures the links between its workers, keeps KV off slow ones, and opens whatever a peer does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, Scheduler, Worker

from distkv_dask import Engine, SamplingParams
from distkv_dask.completion import Completion
from distkv_dask.placement import Endpoint
from distkv_dask.scheduler import link_survey
from distkv_dask.worker.lanes import Lanes
from tests import _proxy
from tests._channels import TCP
from tests._cluster import PROTOCOL, engine_test
from tests._models import block_bytes, model_dir, prompt_ids, reference_generate
from tests._proxy import Proxy, Trouble

pytestmark = pytest.mark.skipif(PROTOCOL == "ucx", reason="the proxy that plays the network carries sockets, not UCX")
SMALL: dict[str, Any] = {"dtype": "float32", "block_tokens": 8, "policy": "best", "channel": "tcp"} | {
    "performance": "auto"
}
TWELVE = SamplingParams(max_new_tokens=12, ignore_eos=True)
PROMPT = prompt_ids(120)
OWN = {"threads": False}
"""Checks at the end of a cluster: threads are left out, because networks have threads until the end of a test."""


class Networks:
    """Proxies before workers, by Dask address, installed before their lanes start."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trouble: dict[str, Trouble] = {}
        self._proxies: dict[tuple[str, int], Proxy] = {}
        real: Any = Lanes.endpoint
        monkeypatch.setattr(Lanes, "endpoint", property(lambda lanes: self._through(real.fget(lanes))))

    def _through(self, endpoint: Endpoint) -> Endpoint:
        if endpoint.worker not in self.trouble:
            return endpoint
        key = endpoint.worker, endpoint.port
        if key not in self._proxies:
            self._proxies[key] = Proxy(TCP, endpoint)
            self._proxies[key].trouble = self.trouble[endpoint.worker]
        return self._proxies[key].endpoint

    def close(self) -> None:
        for proxy in self._proxies.values():
            proxy.close()


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Networks]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = Networks(monkeypatch)
    yield made
    made.close()


def right(done: Completion) -> bool:
    (expected,) = reference_generate(model_dir("llama-gqa"), [PROMPT], 12)
    return list(done.token_ids) == expected.tokens


def small(client: Client, blocks: int = 12, **settings: Any) -> Engine:
    """An engine whose workers have room for ``blocks`` blocks each; the prompt needs two workers."""
    return Engine(client, str(model_dir("llama-gqa")), kv_memory=blocks * block_bytes("llama-gqa"), **SMALL | settings)


@pytest.mark.parametrize("setting", ["auto", "preset"])
def test_kv_stays_off_a_worker_behind_a_slow_link_once_it_is_measured(networks: Networks, setting: str) -> None:
    @engine_test(workers=3, clean_kwargs=OWN)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        far = max(worker.address for worker in workers)  # the others measure the link to it
        networks.trouble[far] = _proxy.slow(0.02)
        async with small(client, performance=setting) as engine:
            links = {(one.one, one.other): one for one in (await engine.status()).links}
            (done,) = await engine.generate([PROMPT], TWELVE)
        assert right(done)
        used = {span.worker for span in done.placement}
        if setting == "preset":
            assert not links
            assert far in used, "nobody knows better"
            return
        assert len(links) == 3
        assert all((one.latency >= 0.01) == (far in both) for both, one in links.items())
        assert far not in used

    run()


@engine_test(workers=2)
async def _join(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
    async with small(client) as engine:
        assert len((await engine.status()).links) == 1
        async with Worker(scheduler.address, nthreads=1) as late:
            for _ in range(400):
                links = (await engine.status()).links
                if len(links) == 3:
                    break
                await asyncio.sleep(0.05)
            assert sorted(late.address in (one.one, one.other) for one in links) == [False, True, True]


def test_a_worker_that_joins_later_is_measured_too(networks: Networks) -> None:
    _join()


@pytest.mark.parametrize("trouble", [_proxy.silence, _proxy.garble, _proxy.close])
def test_an_engine_opens_and_works_although_a_link_cannot_be_measured(networks: Networks, trouble: Trouble) -> None:
    @engine_test(workers=3, clean_kwargs=OWN)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        far = max(worker.address for worker in workers)
        networks.trouble[far] = trouble
        async with small(client, blocks=40) as engine:
            (link,) = (await engine.status()).links
            assert {link.one, link.other} == {worker.address for worker in workers} - {far}
            (done,) = await engine.generate([PROMPT], TWELVE)
            assert right(done)

    run()


def test_opening_waits_no_longer_for_links_than_its_limit(networks: Networks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_survey, "SECONDS", 0.1)

    @engine_test(workers=2, clean_kwargs=OWN)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with small(client, blocks=40):
            pass  # workers are timed now, for which each is its own holder
        networks.trouble[max(worker.address for worker in workers)] = _proxy.slow(3.0)
        began = time.monotonic()
        async with small(client, blocks=40) as engine:
            (state,) = scheduler.plugins["distkv"].engines.values()
            assert not state.links.unknown(), "it is not tried again"
            assert state.links.failed
            (done,) = await engine.generate([PROMPT], TWELVE)
            assert right(done)
            assert time.monotonic() - began < 30
        networks.trouble.clear()

    run()
