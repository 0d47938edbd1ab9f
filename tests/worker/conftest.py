"""Every test of the data plane ends with the threads and sockets that it began with."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import psutil
import pytest


def _left_open() -> tuple[set[str], int]:
    threads = {thread.name for thread in threading.enumerate() if thread.name.startswith("distkv-")}
    return threads, len(psutil.Process().net_connections("all"))


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = _left_open()
    yield
    deadline = time.monotonic() + 5.0
    while (after := _left_open()) != before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert after == before
