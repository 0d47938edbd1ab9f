"""A trace file is readable whenever its writer dies, says what was lost, and does not fill the disk."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from distkv_dask.client import trace_file
from distkv_dask.client.trace_file import TraceFile
from distkv_dask.errors import ConfigError
from distkv_dask.messages.names import Span, Spans
from distkv_dask.worker.trace import CAPACITY, Ring


def events(file: TraceFile) -> list[dict[str, Any]]:
    return json.loads(file.path.read_text())["traceEvents"]


def span(name: str, began: int, ended: int, peer: str = "") -> Span:
    return Span(name, began, ended, 7, 3, 2, peer, 2304)


def test_the_file_is_whole_after_every_addition(tmp_path: Path) -> None:
    file = TraceFile(str(tmp_path / "trace.json"), "e1")
    assert events(file) == []
    for count in range(1, 4):
        began = file._began + count * 10**9
        file.add({"w0": {"home lane": Spans([span("model", began, began + 1500)], 0), "holder lane": Spans([], 0)}})
        done = [event for event in events(file) if event["ph"] == "X"]
        assert len(done) == count
        assert (done[-1]["ts"], done[-1]["dur"]) == (count * 1e6, 1.5)
        assert done[-1]["args"] == {"gang": 7, "step": 3, "layer": 2, "size": 2304}


def test_arrows_lead_from_a_query_over_its_answer_to_the_end_of_the_wait(tmp_path: Path) -> None:
    file = TraceFile(str(tmp_path / "trace.json"), "e1")
    at = file._began
    home = [span("send", at, at + 1000, "w1"), span("wait", at + 5000, at + 9000, "w1")]
    holder = [span("answer", at + 2000, at + 8000, "w0"), span("send", at + 7000, at + 8000, "w0")]
    file.add({"w0": {"home lane": Spans(home, 0)}, "w1": {"holder lane": Spans(holder, 0)}})
    arrow = [event for event in events(file) if event["name"] == "query and partial"]
    assert [(event["ph"], event["pid"], event["ts"]) for event in arrow] == [("s", 1, 0), ("f", 1, 8.999), ("t", 2, 2)]
    assert len({event["id"] for event in arrow}) == 1


def test_a_folder_gets_a_file_for_each_engine(tmp_path: Path) -> None:
    files = [TraceFile(str(tmp_path), engine) for engine in ("e1", "e2")]
    assert sorted(tmp_path.iterdir()) == [file.path for file in files]


def test_a_path_that_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"distkv\.trace is .*give a file"):
        TraceFile(str(tmp_path / "none" / "trace.json"), "e1")


def test_a_trace_ends_at_its_limit_and_stays_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trace_file, "FILE_BYTES", 2000)
    file = TraceFile(str(tmp_path / "trace.json"), "e1")
    with caplog.at_level(logging.WARNING):
        for _ in range(100):
            file.add({"w0": {"home lane": Spans([span("model", file._began, file._began + 1)], 0)}})
    assert file.full
    assert file.path.stat().st_size <= 2100
    assert len(events(file)) > 2
    assert [record for record in caplog.messages if "ends here" in record] == caplog.messages[:1]


def test_a_ring_that_nobody_empties_keeps_the_last_spans_and_counts_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ring = Ring()
    for number in range(CAPACITY + 3):
        ring.put("model", 0, number)
    spans, lost = ring.take_spans()
    assert (len(spans), spans[0].gang, lost) == (CAPACITY, 3, 3)
    assert ring.take_spans() == ([], 0)
    file = TraceFile(str(tmp_path / "trace.json"), "e1")
    with caplog.at_level(logging.WARNING):
        file.add({"w0": {"home lane": Spans(spans[:5], lost)}})
    assert "3 spans of home lane on w0 were lost" in caplog.text
    assert "3 spans lost" in [event["name"] for event in events(file)]
