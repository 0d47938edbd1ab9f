"""A holder lane with a pool, and a home; every test must end with the threads and sockets with which it began."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import psutil
import pytest
import torch
from _channels import WAYS, Way, skip_without
from _fakes import TOKEN
from _peers import HEAD_DIM, KV_HEADS, Holder, connect

from distkv_dask.worker.blocks.pool import BlockShape, Pool
from distkv_dask.worker.channels.base import Channel
from distkv_dask.worker.holder import native_turns as native_session
from distkv_dask.worker.holder.service import Limits, Service
from distkv_dask.worker.home import native_exchange as native_exchange
from distkv_dask.worker.model import host_files


def _open_now(sockets: bool) -> set[Any]:
    """Our threads and, by inode, this process's sockets."""
    threads = {thread for thread in threading.enumerate() if thread.name.startswith("distkv-")}
    if not sockets:
        return set(threads)
    inodes = set()
    for one in psutil.Process().net_connections("all"):
        with suppress(OSError):  # closed meanwhile
            inodes.add(os.fstat(one.fd).st_ino)
    return threads | inodes


@pytest.fixture(autouse=True)
def room_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are copied to files that processes share however full this machine's disk is."""
    monkeypatch.setattr(host_files, "FREE", 0.0)


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    # On a busy machine, ucxx 0.52 keeps sockets of endpoints that were closed during a message for a while, so that
    # some may close in a later test. Tests of UCX count sockets themselves if needed.
    sockets = "ucx" not in request.node.nodeid
    before = _open_now(sockets)
    yield
    deadline = time.monotonic() + 5.0
    while (left := _open_now(sockets) - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left


@pytest.fixture
def pool() -> Pool:
    made = Pool(BlockShape(2, KV_HEADS, HEAD_DIM, "float32", 16), 16)
    torch.manual_seed(0)
    made.storage.normal_()
    made.reserve(1, 0, 40)
    return made


@pytest.fixture(params=WAYS, ids=lambda way: way.name)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    """Every kind of channel in turn."""
    skip_without(request.param)
    if not request.param.native:
        monkeypatch.setattr(native_exchange, "wire", lambda: None)
        monkeypatch.setattr(native_session, "wire", lambda: None)
    return request.param


@pytest.fixture
def lane(pool: Pool, way: Way, request: pytest.FixtureRequest) -> Iterator[Holder]:
    """A holder lane; ``@impatient`` tests get one that waits half a second."""
    limit = getattr(request, "param", 20.0)
    lane = Holder(way)
    lane.attach(Service("engine", TOKEN.encode(), pool, Limits(limit, limit / 2)))
    yield lane
    lane.close()
    lane.close()


@pytest.fixture
def home(lane: Holder) -> Iterator[Channel]:
    channel = connect(lane)
    yield channel
    channel.close()
