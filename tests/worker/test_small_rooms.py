"""Small parts of the worker: cached measurements, traces, structures shared with C++, and metrics for Dask."""

from __future__ import annotations

import ctypes
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distkv_dask.gang import Exchanged
from distkv_dask.geometry import Measurement
from distkv_dask.worker import dask_metrics, trace
from distkv_dask.worker.lanes import Lanes
from distkv_dask.worker.native import structs
from distkv_dask.worker.native.marks import NAMES
from distkv_dask.worker.timing.measurement_cache import cache_home, cached_measurement
from distkv_dask.worker.trace import Ring, Tracer

# Measurements

TIMED = Measurement(((1, 64, 0.5), (8, 512, 0.7)), ((128, 0, 0.1),), ((64, 1e-3), (4096, 2e-3)), 0.25)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


class Machine:
    """A timed machine that counts its measurements."""

    def __init__(self, found: Measurement | None = TIMED) -> None:
        self.found, self.times = found, 0

    def __call__(self) -> Measurement | None:
        self.times += 1
        return self.found


def test_what_was_measured_is_known_the_next_time_whatever_the_order_of_the_key() -> None:
    machine = Machine()
    assert cached_measurement({"model": "m", "threads": 2}, "auto", machine) == TIMED
    assert cached_measurement({"threads": 2, "model": "m"}, "auto", machine) == TIMED
    assert machine.times == 1
    cached_measurement({"threads": 3, "model": "m"}, "auto", machine)
    assert machine.times == 2
    assert len(list(cache_home().iterdir())) == 2


def test_who_asks_to_measure_is_not_told_what_was_known() -> None:
    cached_measurement({"model": "m"}, "auto", Machine())
    other = Measurement(exchange=0.5)
    machine = Machine(other)
    assert cached_measurement({"model": "m"}, "measure", machine) == other
    assert cached_measurement({"model": "m"}, "auto", Machine()) == other, "and it is known from then on"
    assert cached_measurement({"model": "m"}, "preset", machine) is None
    assert machine.times == 1


def test_what_could_not_be_measured_is_not_kept() -> None:
    machine = Machine(None)
    for _ in range(2):
        assert cached_measurement({"model": "m"}, "auto", machine) is None
    assert machine.times == 2


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"measured": 3}', '{"measured": {"decode": [[1]]}}', "\x00\x01"])
def test_a_file_that_is_no_measurement_is_taken_again(content: str, caplog: pytest.LogCaptureFixture) -> None:
    cached_measurement({"model": "m"}, "auto", Machine())
    (file,) = cache_home().iterdir()
    file.write_text(content)
    assert cached_measurement({"model": "m"}, "auto", Machine()) == TIMED
    assert "cannot be read" in caplog.text
    assert json.loads(file.read_text())["key"] == {"model": "m"}


def test_a_cache_that_cannot_be_written_costs_time_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    assert cached_measurement({"model": "m"}, "auto", Machine()) == TIMED
    assert "cannot be kept" in caplog.text
    assert list(cache_home().iterdir()) == []


# Traces


def test_spans_are_taken_once_in_order_with_the_times_of_the_wall_clock() -> None:
    ring, before = Ring(), time.time_ns()
    began = time.perf_counter_ns()
    ends = [ring.put(name, began, 7, step=step, peer="p", size=3) for step, name in enumerate(("a", "b"))]
    taken = ring.take_spans()
    assert [(one.name, one.gang, one.step, one.layer, one.peer, one.size) for one in taken.spans] == [
        ("a", 7, 0, -1, "p", 3),
        ("b", 7, 1, -1, "p", 3),
    ]
    assert ring.last == ends[-1]
    for one, ended in zip(taken.spans, ends, strict=True):
        assert one.ended - one.began == ended - began
        assert abs(one.began - before) < 10**9
    assert ring.take_spans() == ([], 0)


def test_a_ring_that_is_not_emptied_keeps_the_latest_and_counts_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "CAPACITY", 4)
    ring = Ring()
    for step in range(11):
        ring.put("name", 0, 1, step=step)
    taken = ring.take_spans()
    assert [one.step for one in taken.spans] == [7, 8, 9, 10]
    assert taken.lost == 7
    ring.put("name", 0, 1)
    assert ring.take_spans().lost == 0, "each lost span is counted once"


def test_what_cpp_marked_is_collected_with_what_it_lost() -> None:
    ring = Ring()
    marks = structs.Marks.from_address(ring.native.address)
    room = (structs.Mark * marks.capacity).from_address(marks.room)
    peer = ring.native.number("tcp://peer")
    assert ring.native.number("tcp://other") != peer == ring.native.number("tcp://peer")
    room[0] = structs.Mark(0, 100, 200, 7, 1, 2, peer, 64)
    room[1] = structs.Mark(1, 200, 300, 7, 1, 2, -1, -1)
    marks.count, marks.lost = 2, 5
    ring.collect()
    taken = ring.take_spans()
    assert [(one.name, one.ended - one.began, one.layer, one.peer, one.size) for one in taken.spans] == [
        (NAMES[0], 100, 2, "tcp://peer", 64),
        (NAMES[1], 100, 2, "", -1),
    ]
    assert taken.lost == 5
    assert ring.last == 300
    ring.collect()
    assert ring.take_spans() == ([], 0)


def test_a_tracer_tells_lanes_apart() -> None:
    tracer = Tracer()
    tracer.home.put("a", 0, 1)
    assert {lane: len(spans.spans) for lane, spans in tracer.take_spans().items()} == {"home lane": 1, "holder lane": 0}


# Structures

NATIVE = Path(structs.__file__).parent
SOURCES = {
    structs.Holder: "home.cpp",
    structs.Home: "home.cpp",
    structs.Session: "holder.cpp",
    structs.Mark: "marks.h",
    structs.Marks: "marks.h",
}


def fields_in_cpp(structure: type[ctypes.Structure]) -> list[tuple[str, str]]:
    """Names and types of a structure's fields in its source."""
    text = re.sub(r"//.*", "", (NATIVE / SOURCES[structure]).read_text())
    body = re.search(rf"struct {structure.__name__} \{{(.*?)\n\}};", text, re.DOTALL)
    assert body is not None
    found = []
    for declaration in body[1].split(";"):
        if not declaration.strip():
            continue
        kind, names = re.fullmatch(r"\s*((?:const )?[\w:]+\s*\**)\s*(.*?)\s*", declaration, re.DOTALL).groups()  # type: ignore[union-attr]
        found += [
            (name.split("=")[0].strip(" *"), "pointer" if "*" in kind + name else kind) for name in names.split(",")
        ]
    return found


KINDS = {
    "pointer": ctypes.c_void_p,
    "MergeCall": ctypes.c_void_p,  # a function pointer
    "int64_t": ctypes.c_int64,
    "double": ctypes.c_double,
    "Header": structs.HeaderBytes,
}


@pytest.mark.parametrize("structure", SOURCES, ids=lambda one: one.__name__)
def test_fields_have_the_names_and_types_in_python_that_they_have_in_cpp(structure: Any) -> None:
    """Sizes and offsets are compared when the library is loaded; two fields of one size could still change places."""
    assert [(name, kind) for name, kind in structure._fields_] == [
        (name, KINDS[kind.strip()]) for name, kind in fields_in_cpp(structure)
    ]


# Lanes and metrics


@pytest.mark.parametrize("ended", ["home", "holder"])
def test_a_worker_of_which_one_lane_ended_has_none(ended: str) -> None:
    lanes = Lanes("inproc://w", "127.0.0.1", 1)
    try:
        assert not lanes.closed
        assert lanes.endpoint.worker == "inproc://w"
        getattr(lanes, ended).close(10.0)
        assert lanes.closed
    finally:
        lanes.close()
        lanes.close()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], float]:
    found: dict[tuple[str, str], float] = {}
    meter = SimpleNamespace(digest_metric=lambda label, value, unit: found.__setitem__((label, unit), value))
    monkeypatch.setattr(dask_metrics, "context_meter", meter)
    return found


def test_the_parts_of_a_tasks_time_add_up_to_it(
    told: dict[tuple[str, str], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 2.0, 9.0, 10.0])
    monkeypatch.setattr(dask_metrics, "perf_counter", lambda: next(clock))
    with dask_metrics.metered() as parts, dask_metrics.computing(parts, lambda: Exchanged(1.0, 2.5, 0, 0)):
        pass
    assert told == {
        ("distkv send queries", "seconds"): 1.0,
        ("distkv wait for partials", "seconds"): 2.5,
        ("distkv compute", "seconds"): 3.5,
        ("distkv wait for lane", "seconds"): 3.0,
    }
    assert sum(told.values()) == 10.0


def test_a_task_that_fails_tells_nothing(told: dict[tuple[str, str], float]) -> None:
    def fail() -> None:
        with dask_metrics.metered() as parts:
            parts["distkv compute"] = 1.0
            raise ValueError("a fault")

    with pytest.raises(ValueError, match="a fault"):
        fail()
    assert not told


def test_a_holders_session_tells_its_work_and_its_rest(
    told: dict[tuple[str, str], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 10.0])
    monkeypatch.setattr(dask_metrics, "perf_counter", lambda: next(clock))
    with dask_metrics.metered_session() as done:
        done.append(SimpleNamespace(busy_seconds=4.0, bytes_in=7, bytes_out=9))  # type: ignore[arg-type]
    assert told == {
        ("distkv compute", "seconds"): 4.0,
        ("distkv idle", "seconds"): 6.0,
        ("distkv queries", "bytes"): 7,
        ("distkv partials", "bytes"): 9,
    }
