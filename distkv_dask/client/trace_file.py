"""A trace as a file: spans of all workers' lanes in the JSON of Chrome's trace viewer, which ui.perfetto.dev opens."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distkv_dask.errors import ConfigError
from distkv_dask.messages.names import Span, Spans

logger = logging.getLogger("distributed.distkv.trace")

FILE_BYTES = 256 << 20
"""A trace ends when its file is this long; about 1.5 million spans."""

CATEGORIES = {
    "model": "compute",
    "local attention": "compute",
    "merge": "compute",
    "attend": "compute",
    "begin": "wait",
    "wait": "wait",
    "idle": "wait",
    "send": "send",
    "receive": "send",
}
"""Category of time by name of the spans that contain no others; other spans are frames."""

_END = b"\n]}\n"
_FLOW = {"send": "s", "answer": "t", "wait": "f"}


class TraceFile:
    """A file that can be opened at any time, even after its writer was killed: it is complete after every addition.

    Each worker is a process in it and each of its lanes a thread; arrows lead from a home's query through the holder's
    answer to the end of the home's wait.

    Parameters
    ----------
    path
        The file, which is overwritten, or a folder for it.
    engine
        The engine's id: the file's name within a folder, also written into the file.

    Raises
    ------
    ConfigError
        The file cannot be written.
    """

    def __init__(self, path: str, engine: str) -> None:
        self.path = Path(path).expanduser()
        if self.path.is_dir():
            self.path /= f"distkv-{engine}.json"
        self.full = False
        """Whether the file has reached its limit and accepts nothing more."""
        self._began = time.time_ns()
        self._adding = threading.Lock()
        self._workers: dict[str, int] = {}
        self._lanes: dict[tuple[str, str], int] = {}
        about = {"engine": engine, "began": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        head = f'{{"displayTimeUnit": "ms", "otherData": {json.dumps(about)}, "traceEvents": ['.encode()
        self._empty = True
        self._length = len(head)
        try:
            self.path.write_bytes(head + _END)
        except OSError as error:
            raise ConfigError(
                f"distkv.trace is {path!r}, where nothing can be written ({error}): give a file in a folder that "
                "exists, or a folder"
            ) from error

    def add(self, workers: Mapping[str, Mapping[str, Spans]]) -> None:
        """Append spans by worker and lane.

        Raises
        ------
        OSError
            The disk is full.
        """
        with self._adding:
            events = [json.dumps(event) for event in self._events(workers)]
            if not events or self.full:
                return
            addition = (("\n" if self._empty else ",\n") + ",\n".join(events)).encode()
            self.full = self._length + len(addition) > FILE_BYTES
            if self.full:
                logger.warning("trace %s has reached %d bytes and ends here", self.path, self._length)
                return
            with self.path.open("r+b", buffering=0) as file:
                file.seek(self._length)
                file.write(addition + _END)
            self._length, self._empty = self._length + len(addition), False

    def _events(self, workers: Mapping[str, Mapping[str, Spans]]) -> Iterator[dict[str, Any]]:
        for worker, lanes in workers.items():
            for lane, (spans, lost) in lanes.items():
                if not spans:
                    continue
                if worker not in self._workers:
                    self._workers[worker] = pid = len(self._workers) + 1
                    yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": worker}}
                at = {"pid": self._workers[worker], "tid": self._lanes.get((worker, lane), 0)}
                if not at["tid"]:
                    at["tid"] = self._lanes[worker, lane] = len(self._lanes) + 1
                    yield {"ph": "M", "name": "thread_name", **at, "args": {"name": lane}}
                if lost:
                    logger.warning("%d spans of %s on %s were lost: they came faster than fetched", lost, lane, worker)
                    yield {"ph": "i", "s": "t", "name": f"{lost} spans lost", "ts": self._micros(spans[0].began), **at}
                for span in spans:
                    yield from self._span_events(span, worker, lane, at)

    def _span_events(self, span: Span, worker: str, lane: str, at: dict[str, int]) -> Iterator[dict[str, Any]]:
        began = self._micros(span.began)
        numbers = {"gang": span.gang, "step": span.step, "layer": span.layer, "size": span.size}
        args: dict[str, Any] = {name: number for name, number in numbers.items() if number >= 0}
        if span.peer:
            args["peer"] = span.peer
        yield {
            "ph": "X",
            "name": span.name,
            "cat": CATEGORIES.get(span.name, "frame"),
            "ts": began,
            "dur": round((span.ended - span.began) / 1000, 3),
            **at,
            "args": args,
        }
        if span.peer and span.name in _FLOW and (lane == "home lane" or span.name == "answer"):
            holder = worker if span.name == "answer" else span.peer
            yield {
                "ph": _FLOW[span.name],
                "bp": "e",
                "name": "query and partial",
                "cat": "flow",
                "id": f"{span.gang}/{span.step}/{span.layer}/{holder}",
                "ts": self._micros(span.ended - 1 if span.name == "wait" else span.began),
                **at,
            }

    def _micros(self, nanos: int) -> float:
        return round((nanos - self._began) / 1000, 3)
