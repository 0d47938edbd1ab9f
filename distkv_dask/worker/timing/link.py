"""How fast frames travel from this worker to another one and back, through the channel that requests use.

The peer's holder lane returns the frames. Other work only makes trips slower, so the fastest ones count. A link
between machines is kept for a day with the other measurements; between workers of one machine it is measured each time,
which takes about 10 ms.
"""

from __future__ import annotations

import time
from typing import Any

from distkv_dask.geometry import LinkTimes
from distkv_dask.placement import Endpoint
from distkv_dask.worker.channels.base import Channel
from distkv_dask.worker.channels.frames import Header, Kind
from distkv_dask.worker.channels.unix import is_near
from distkv_dask.worker.runtime import Runtime
from distkv_dask.worker.timing.measurement_cache import cache_file, hardware, is_young, keep, read_kept

FORM = 1
"""Version of the measurement."""
SECONDS = 1.0
"""A link that takes longer than this is not measured."""
TRIPS = 32
"""Maximum trips of one size."""
LEAST_TRIPS = 3
SIZE_SECONDS = 0.02
"""Time for trips of one size, but at least ``LEAST_TRIPS``."""
SIZES = (64 << 10, 256 << 10, 1 << 20)
"""Bytes of large frames; the next size is tried while a trip takes less than ``SIZE_SECONDS``."""
KEPT_SECONDS = 24 * 3600
"""After this time, a link between machines is measured again."""


def link_times(runtime: Runtime, peer: Endpoint) -> LinkTimes:
    """Measure the link to a worker on which the engine of ``runtime`` is open, or read a kept measurement.

    Raises
    ------
    ChannelError, ChannelTimeoutError, GangAbortedError
        The worker cannot be reached, does not answer in time, or sends something else.
    """
    config = runtime.spec.config
    if is_near(peer.unix):
        return _measured(runtime, peer)
    ends = {"here": runtime.lanes.endpoint.host, "there": peer.host}
    key = {"form": FORM, "link": ends, "channel": runtime.dialer.explain(), **hardware(runtime.pool.device.name)}
    file = cache_file(key)
    known = read_kept(file, _times_of) if config.performance == "auto" and is_young(file, KEPT_SECONDS) else None
    if known is not None:
        return known
    fresh = _measured(runtime, peer)
    keep(file, key, {"latency": fresh.latency, "bandwidth": fresh.bandwidth})
    return fresh


def _measured(runtime: Runtime, peer: Endpoint) -> LinkTimes:
    if runtime.dialer.uses_ucx:  # it may be used by one thread only
        return runtime.lanes.home.submit(_in_this_thread, runtime, peer).result()
    return _in_this_thread(runtime, peer)


def _in_this_thread(runtime: Runtime, peer: Endpoint) -> LinkTimes:
    until = time.monotonic() + SECONDS
    channel = runtime.dialer.connect(peer, SECONDS)
    try:
        channel.limit(SECONDS)
        runtime.channels.greet(channel)
        small = _trip(channel, 0, until)
        bandwidth = 0.0
        for size in SIZES:
            seconds = _trip(channel, size, until)
            bandwidth = max(bandwidth, 2 * size / max(seconds - small, seconds / 10))
            if seconds > SIZE_SECONDS or time.monotonic() > until - SECONDS / 2:
                break
        return LinkTimes(small / 2, bandwidth)
    finally:
        channel.close()


def _trip(channel: Channel, size: int, until: float) -> float:
    """Seconds of the fastest of a few round trips with this many bytes."""
    sent, received = bytes(size), bytearray(size)
    best, began = float("inf"), time.perf_counter()
    for trip in range(TRIPS):
        started = time.perf_counter()
        if trip and ((started - began > SIZE_SECONDS and trip >= LEAST_TRIPS) or time.monotonic() > until):
            break
        channel.limit(max(0.05, until - time.monotonic()))
        started = time.perf_counter()
        channel.send(Header(Kind.PING, step=trip, length=size), sent)
        channel.recv_into(Header(Kind.PONG, step=trip, length=size), memoryview(received))
        best = min(best, time.perf_counter() - started)
    return best


def _times_of(kept: Any) -> LinkTimes:
    times = LinkTimes(float(kept["latency"]), float(kept["bandwidth"]))
    if not (0 <= times.latency < SECONDS and times.bandwidth > 0):
        raise ValueError(f"a link of {times}")
    return times
