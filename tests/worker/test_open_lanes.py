"""Lanes exist while an engine is open, their memory is returned to the system, and a process that must end does."""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from distkv_dask.errors import CapacityError
from distkv_dask.worker import exit as leaving
from distkv_dask.worker import heap, import_ahead, open_lanes
from distkv_dask.worker import lanes as lanes_module
from distkv_dask.worker.channels import tls
from distkv_dask.worker.guard import attempt, run_lane


class FakeLanes:
    """Lanes that record how they were made, and how often they were closed."""

    def __init__(self, *given: Any) -> None:
        self.given, self.closes = given, 0

    def close(self) -> None:
        self.closes += 1


@pytest.fixture
def given_back(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """The threads that returned memory."""
    threads: list[threading.Thread] = []
    monkeypatch.setattr(lanes_module, "Lanes", FakeLanes)
    monkeypatch.setattr(tls.Certificates, "of", classmethod(lambda cls, security: security))
    monkeypatch.setattr(open_lanes, "give_back_freed_memory", lambda: threads.append(threading.current_thread()))
    return threads


def of_worker(address: str = "tcp://10.0.0.7:4711", threads: int = 3) -> open_lanes.OpenLanes:
    worker: Any = SimpleNamespace(address=address, security="its", state=SimpleNamespace(nthreads=threads))
    return open_lanes.OpenLanes(worker, print)


@pytest.mark.parametrize(
    ("address", "host"),
    [("tcp://10.0.0.7:4711", "10.0.0.7"), ("tls://[::1]:80", "::1"), ("inproc://10.0.0.7/1/2", "127.0.0.1")],
)
@pytest.mark.parametrize(("asked", "threads"), [(None, 3), (2, 2)])
def test_lanes_listen_where_dask_does_with_the_threads_that_are_asked_for(
    given_back: list[Any], address: str, host: str, asked: int | None, threads: int
) -> None:
    made = of_worker(address)
    assert made.current is None
    lanes: Any = made.start(asked)
    assert lanes.given == (address, host, threads, "its", print)
    assert made.current is lanes
    assert made.start(7) is lanes, "engines share them"


def test_lanes_that_were_given_up_are_not_those_of_the_next_engine(given_back: list[Any]) -> None:
    made = of_worker()
    first: Any = made.start(1)
    made.give_up(first)
    assert made.current is None
    second: Any = made.start(1)
    assert second is not first
    made.give_up(first)
    assert made.current is second, "they are others' by now"
    asyncio.run(made.close(first))
    assert (first.closes, second.closes) == (1, 0)
    assert made.current is second


def test_closing_lanes_gives_memory_back_off_the_loop_and_is_done_once(given_back: list[threading.Thread]) -> None:
    made = of_worker()
    asyncio.run(made.close())
    assert given_back == [], "there was nothing to close"
    lanes: Any = made.start(1)
    asyncio.run(made.close())
    asyncio.run(made.close())
    assert (lanes.closes, made.current) == (1, None)
    assert len(given_back) == 1
    assert given_back[0] is not threading.main_thread()


# Memory of the C library


class Library:
    """A C library that records its calls."""

    def __init__(self, has: tuple[str, ...] = ("mallopt", "malloc_trim"), takes: bool = True) -> None:
        self.told: list[tuple[Any, ...]] = []
        if "mallopt" in has:
            self.mallopt = lambda *given: (self.told.append(given), takes)[1]
        if "malloc_trim" in has:
            self.malloc_trim = lambda pad: self.told.append(("trim", pad))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: made)
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    return made


TRIM, MMAP = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h."""


def test_freed_memory_is_kept_for_the_next_forward(library: Library) -> None:
    assert heap.keep_freed_memory()
    assert library.told == [(MMAP, 32 << 20), (TRIM, 256 << 20)]


@pytest.mark.parametrize("made", [Library(()), Library(takes=False)], ids=["another library", "it refuses"])
def test_who_cannot_keep_memory_says_so(made: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: made)
    assert not heap.keep_freed_memory()
    heap.give_back_freed_memory()


@pytest.mark.parametrize(
    ("environment", "options"),
    [
        ({}, []),
        ({"TRIM": "65536"}, [(TRIM, 65536), (MMAP, 128 << 10)]),
        ({"TRIM": "65536", "MMAP": "4096"}, [(TRIM, 65536), (MMAP, 4096)]),
        ({"TRIM": "no number", "MMAP": "4096"}, []),
        ({"TRIM": "65536", "MMAP": "-1"}, [(TRIM, 65536), (MMAP, 128 << 10)]),
    ],
)
def test_memory_goes_back_as_dasks_nanny_asked(
    library: Library, environment: dict[str, str], options: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(f"MALLOC_{name}_THRESHOLD_", value)
    heap.give_back_freed_memory()
    assert library.told == [*options, ("trim", 0)]


# The end of a process


@pytest.mark.parametrize("nanny", ["tcp://nanny", None])
def test_a_process_ends_in_time_if_a_nanny_starts_another(nanny: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    timers: list[Any] = []

    class Timer:
        def __init__(self, *given: Any) -> None:
            self.given, self.daemon, self.started = given, False, False
            timers.append(self)

        def start(self) -> None:
            assert self.daemon, "Python would wait for it when it ends"
            self.started = True

    closed: list[dict[str, Any]] = []

    class Worker:
        def __init__(self) -> None:
            self.nanny = nanny

        async def close(self, **given: Any) -> None:
            closed.append({**given, "timers": len(timers)})

    monkeypatch.setattr(leaving.threading, "Timer", Timer)  # type: ignore[attr-defined]
    asyncio.run(leaving.end_process(Worker(), "its card failed", 7.5))  # type: ignore[arg-type]
    many = 0 if nanny is None else 1
    assert closed == [{"nanny": False, "executor_wait": False, "reason": "its card failed", "timers": many}]
    assert [(one.given, one.started) for one in timers] == [((7.5, os._exit, (1,)), True)] * many


def test_imports_ahead_run_beside_the_worker_and_do_not_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[tuple[str, bool]] = []
    done = threading.Event()

    def note() -> None:
        here = threading.current_thread()
        threads.append((here.name, here.daemon))
        done.set()

    monkeypatch.setattr(import_ahead, "_import", note)
    import_ahead.import_ahead()
    assert done.wait(20)
    assert threads == [("distkv-import-ahead", True)]
    monkeypatch.undo()
    import_ahead._import()
    assert {"distkv_dask.worker.startup", "distkv_dask.worker.model.shared", "torch"} <= sys.modules.keys()


# Lanes that end by themselves


@pytest.mark.parametrize("error", [ValueError("odd"), CapacityError("no room"), KeyError("x")])
def test_no_exception_of_a_call_ends_a_lane(error: Exception) -> None:
    def fail() -> None:
        raise error

    assert attempt(fail) is error
    assert attempt(lambda: 5) is None


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_what_must_end_a_thread_is_not_caught(error: BaseException) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        attempt(fail)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("odd"), "its home lane ended: ValueError: odd"),
        (CapacityError("no room"), "its home lane ended: no room"),
        (SystemExit(3), "its home lane ended: SystemExit: 3"),
    ],
)
def test_the_end_of_a_lane_is_reported_with_its_reason(
    error: BaseException, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise error

    reasons: list[str] = []
    run_lane("home lane", fail, reasons.append)
    assert reasons == [words]
    assert caplog.records[0].levelname == "CRITICAL"
    run_lane("home lane", lambda: None, reasons.append)
    assert len(reasons) == 1, "a lane that was closed has not ended by itself"


def test_an_end_that_nobody_can_be_told_of_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the loop is closed")

    run_lane("holder lane", fail, fail)
    assert [record.levelname for record in caplog.records] == ["CRITICAL", "ERROR"]
    assert "the end of the holder lane could not be reported" in caplog.text
