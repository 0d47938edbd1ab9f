"""Workers time themselves when an engine opens, and leave nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from _channels import TCP, UNIX, Way
from _fakes import Member, loaded

from distkv_dask.config import Config
from distkv_dask.geometry import Measurement
from distkv_dask.messages.names import EngineSpec
from distkv_dask.worker.timing.disturbance import disturbance
from distkv_dask.worker.timing.measurement import measure
from distkv_dask.worker.timing.measurement_cache import cached_measurement

TIMED = Measurement(((1, 8, 0.1),), ((32, 0, 0.2),), ((8, 0.3),), 0.4)


@pytest.mark.parametrize("way", [TCP, UNIX], ids=lambda way: way.name)
def test_a_worker_times_steps_prompts_and_an_exchange_and_its_pool_is_as_before(way: Way) -> None:
    model = loaded("llama-gqa")
    spec = EngineSpec("engine", "", "float32", "a token", Config.load(channel=way.channel))
    member = Member("w0", model, 100, 8, spec, way)
    try:
        found = measure("engine", model.geometry, member.runtime, member.lanes, has_model=True)
        assert found is not None
        assert {batch for batch, _, _ in found.decode} == {1, 8}
        assert max(tokens for _, tokens, _ in found.decode) > 500
        assert all(seconds > 0 for *_, seconds in (*found.decode, *found.prompt))
        assert [before > 0 for _, before, _ in found.prompt] == [False, True]
        assert found.exchange is not None
        assert found.exchange >= 0
        assert member.pool.used_blocks == 0
        assert [tokens for tokens, _ in found.attention] == [8, 640]
        memory = measure("engine", model.geometry, member.runtime, member.lanes, has_model=False)
        assert memory is not None
        assert [tokens for tokens, _ in memory.attention] == [8, 640]
        assert member.pool.used_blocks == 0
    finally:
        member.close()


def test_a_pool_too_small_to_time_anything_is_left_alone() -> None:
    model = loaded("llama-gqa")
    member = Member("w0", model, 3, 8, EngineSpec("engine", "", "float32", "a token", Config.load(channel="tcp")), TCP)
    try:
        assert measure("engine", model.geometry, member.runtime, member.lanes, has_model=True) is None
    finally:
        member.close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "distkv-dask" / "performance"


def never() -> Measurement:
    raise AssertionError("it was measured although it is known")


def test_what_was_measured_once_is_read_again_whole_and_other_hardware_is_measured_anew(cache: Path) -> None:
    assert cached_measurement({"cores": 2}, "auto", lambda: TIMED) == TIMED
    assert cached_measurement({"cores": 2}, "auto", never) == TIMED
    other = Measurement(exchange=None)
    assert cached_measurement({"cores": 4}, "auto", lambda: other) == other
    assert cached_measurement({"cores": 4}, "auto", never) == other
    assert cached_measurement({"cores": 2}, "measure", lambda: other) == other
    assert cached_measurement({"cores": 2}, "auto", never) == other
    assert cached_measurement({"cores": 2}, "preset", never) is None
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"measured": {"decode": [[1]]}}'])
def test_a_damaged_cache_is_replaced_and_one_that_cannot_be_written_costs_no_more_than_time(
    content: str, cache: Path
) -> None:
    cached_measurement({}, "auto", lambda: TIMED)
    (file,) = cache.iterdir()
    file.write_text(content)
    assert cached_measurement({}, "auto", lambda: TIMED) == TIMED
    assert json.loads(file.read_text())["measured"]["exchange"] == 0.4
    file.unlink()
    cache.rmdir()
    cache.touch()
    assert cached_measurement({}, "auto", lambda: TIMED) == TIMED


# While other processes use the processors


def kept(file: Path) -> tuple[float, int]:
    measured = json.loads(file.read_text())["measured"]
    return measured["waited"], measured["times"]


@pytest.mark.parametrize("quiet", [True, False])
def test_what_was_taken_while_others_used_the_processors_is_taken_again_once_it_is_quiet(
    cache: Path, monkeypatch: pytest.MonkeyPatch, quiet: bool
) -> None:
    cached_measurement({}, "auto", lambda: TIMED)
    (file,) = cache.iterdir()
    whole = json.loads(file.read_text())
    whole["measured"] |= {"waited": 0.4, "times": 1}
    file.write_text(json.dumps(whole))
    monkeypatch.setattr("os.getloadavg", lambda: (0.1 if quiet else 50.0, 0, 0))
    better = Measurement(exchange=0.1)
    assert cached_measurement({}, "auto", lambda: better) == (better if quiet else TIMED)
    assert kept(file)[1] == (2 if quiet else 1)


def test_a_worker_that_always_waits_for_processors_is_timed_three_times(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0, 0))
    monkeypatch.setattr("distkv_dask.worker.timing.measurement_cache.MOST", -1.0)  # any wait is too long
    for seconds in (0.1, 0.2, 0.3):
        latest = Measurement(exchange=seconds)
        assert cached_measurement({}, "auto", lambda latest=latest: latest) == latest
    assert cached_measurement({}, "auto", never) == Measurement(exchange=0.3)


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the system does not say how long threads wait")
def test_threads_that_share_a_processor_are_seen_to_wait_and_one_that_sleeps_is_not() -> None:
    def work(leave: threading.Event) -> None:
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
        while not leave.is_set():
            sum(range(20_000))

    with disturbance() as idle:
        time.sleep(0.5)
    leave = threading.Event()
    script = "import os\nos.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\nprint(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        worker = threading.Thread(target=work, args=[leave])
        worker.start()
        with disturbance() as busy:
            time.sleep(0.5)
        leave.set()
        worker.join()
        other.kill()
    assert busy.waited > max(0.2, idle.waited)
