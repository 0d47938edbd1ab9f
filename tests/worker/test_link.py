"""A link is measured through the channel that requests use, and no peer can delay the measurement for long."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import _proxy
import pytest
from _channels import TCP, UCX, Bare, Way
from _fakes import fleet, loaded
from _proxy import Proxy

from distkv_dask.errors import ChannelError, ChannelTimeoutError, DistKVError
from distkv_dask.geometry import LinkTimes
from distkv_dask.placement import Endpoint
from distkv_dask.worker.timing import link
from distkv_dask.worker.timing.link import SECONDS, link_times

PATIENCE = 5 * SECONDS
"""Far more than the limit, because this machine may be busy."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize("peer", ["w1", "w0"])
def test_frames_come_back_through_every_kind_of_channel_and_a_gang_runs_afterwards(way: Way, peer: str) -> None:
    with fleet(loaded("llama-gqa"), 2, way) as made:
        times = link_times(made.members["w0"].runtime, made.members[peer].lanes.endpoint)
        assert 0 < times.latency < 0.1
        assert 1e6 < times.bandwidth < 1e12
        placement = made.place(1, ("w1", 16), ("w0", 40))
        assert made.prefill(1, placement, list(range(1, 20))) is not None


def test_a_slow_link_is_known_for_what_it_is(way: Way) -> None:
    if way is UCX:
        pytest.skip("the proxy that plays the network carries sockets, not UCX")
    with fleet(loaded("llama-gqa"), 2, way) as made:
        proxy = Proxy(way, made.members["w1"].lanes.endpoint)
        try:
            proxy.trouble = _proxy.slow(0.02)
            times = link_times(made.members["w0"].runtime, proxy.endpoint)
        finally:
            proxy.close()
        assert 0.01 <= times.latency < 0.1


@pytest.mark.parametrize(
    ("trouble", "kind"),
    [
        (_proxy.silence, ChannelTimeoutError),
        (_proxy.close, ChannelError),
        (_proxy.garble, ChannelError),
        (_proxy.truncate, ChannelError),
    ],
)
def test_a_peer_that_is_silent_or_sends_anything_costs_a_limited_time(
    way: Way, trouble: Any, kind: type[DistKVError]
) -> None:
    if way is UCX:
        pytest.skip("the proxy that plays the network carries sockets, not UCX")
    with fleet(loaded("llama-gqa"), 2, way) as made:
        proxy = Proxy(way, made.members["w1"].lanes.endpoint)
        try:
            proxy.trouble, began = trouble, time.monotonic()
            with pytest.raises(kind):
                link_times(made.members["w0"].runtime, proxy.endpoint)
            assert time.monotonic() - began < PATIENCE
        finally:
            proxy.close()


def test_a_listener_that_never_accepts_costs_a_limited_time(way: Way) -> None:
    if way is UCX:
        pytest.skip("UCX listeners of tests accept by themselves")
    with fleet(loaded("llama-gqa"), 1, way) as made:
        bare = Bare(way)
        try:
            began = time.monotonic()
            with pytest.raises(ChannelTimeoutError):
                link_times(made.members["w0"].runtime, bare.endpoint)
            assert time.monotonic() - began < PATIENCE
        finally:
            bare.close()


def test_a_link_between_machines_is_measured_once_a_day(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [LinkTimes(1e-3, 1e8), LinkTimes(2e-3, 1e8), LinkTimes(3e-3, 1e8), LinkTimes(4e-3, 1e8)]
    monkeypatch.setattr(link, "_measured", lambda runtime, peer: found.pop(0))
    with fleet(loaded("llama-gqa"), 1, TCP) as made:
        runtime = made.members["w0"].runtime
        object.__setattr__(runtime.spec.config, "performance", "auto")
        there = Endpoint("far", "10.0.0.9", 1)
        assert [link_times(runtime, there).latency for _ in range(2)] == [1e-3, 1e-3]
        (file,) = link.cache_file({}).parent.glob("*.json")
        file.write_text("{")
        assert link_times(runtime, there).latency == 2e-3, "what cannot be read is measured again"
        monkeypatch.setattr(link, "KEPT_SECONDS", 0)
        assert link_times(runtime, there).latency == 3e-3
        object.__setattr__(runtime.spec.config, "performance", "measure")
        monkeypatch.undo()
        assert link_times(runtime, made.members["w0"].lanes.endpoint).latency > 0
