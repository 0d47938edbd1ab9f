"""Batches of a server, answered one after the other by a thread; a restarted server continues them."""

from __future__ import annotations

import contextlib
import logging
import queue
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distkv_dask.client.batch.job import Job
from distkv_dask.client.batch.openai_format import OpenAIBatchSource, write_openai_answers
from distkv_dask.client.batch.spec import BatchSpec
from distkv_dask.client.batch.target import Target
from distkv_dask.client.serve.failures import Refusal
from distkv_dask.client.serve.keys import OWNER
from distkv_dask.client.serve.serving import Serving
from distkv_dask.client.serve.store import Store, private
from distkv_dask.errors import DistKVError, in_words, without_quotes

logger = logging.getLogger("distributed.distkv.serve")

OPEN = ("validating", "in_progress", "finalizing", "cancelling")
"""States of a batch that has not ended."""

PRIORITY = -10
"""Priority of batch requests: interactive requests overtake them by up to ten minutes."""

PAUSE = 5.0
"""Seconds before a batch is tried again of which the disk takes nothing, not even that it failed."""


class _Ended(DistKVError):
    """Ends a run: its batch was cancelled, or the server stops."""


class BatchQueue:
    """Batches and their files.

    Parameters
    ----------
    serving
        The open engine.
    store
        Keeps files and batches.
    """

    def __init__(self, serving: Serving, store: Store) -> None:
        self.store = store
        self._serving = serving
        self._waiting: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._current: str | None = None
        self._thread = threading.Thread(target=self._work, name="distkv-batches", daemon=True)

    def start(self) -> None:
        """Start, with batches that an earlier server did not finish."""
        for record in reversed(self.store.records("batch")):
            if record["status"] in OPEN:
                self._waiting.put(record["id"])
        self._thread.start()

    def stop(self) -> None:
        """End the current batch, and keep its answers so far; returns when it has ended."""
        self._stopping.set()
        self._waiting.put(None)
        self._thread.join()

    def add(self, record: dict[str, Any]) -> None:
        """Add a new batch."""
        self.store.write(record)
        self._waiting.put(record["id"])

    def cancel(self, name: str) -> dict[str, Any]:
        """End a batch soon; raises :class:`Refusal` if it has ended."""
        with self._lock:
            record = self.store.read(name)
            if record["status"] not in OPEN:
                raise Refusal(f"batch {name} has ended: it is {record['status']}", 409)
            now = int(time.time())
            if name != self._current:  # it has not started, and never will
                return self._note(record, status="cancelled", cancelling_at=now, cancelled_at=now)
            return self._note(record, status="cancelling", cancelling_at=now)

    def needed(self) -> set[str]:
        """Ids of files that are still needed."""
        return {one["input_file_id"] for one in self.store.records("batch") if one["status"] in OPEN}

    def _work(self) -> None:
        while (name := self._waiting.get()) is not None and not self._stopping.is_set():
            try:
                self._take_turn(name)
            except Exception as error:  # a disk that is full now may have room later
                logger.error("batch %s is tried again in %s s: %s", name, PAUSE, without_quotes(error))
                self._stopping.wait(PAUSE)
                self._waiting.put(name)

    def _take_turn(self, name: str) -> None:
        """Answer a batch if it is still open, or note why it failed."""
        with self._lock:
            self._current = name
            if self.store.read(name)["status"] not in OPEN:
                return
        try:
            self._answer(name)
        except _Ended:
            return  # the next server continues
        except Exception as error:
            logger.error("batch %s failed: %s", name, without_quotes(error))
            errors = {
                "object": "list",
                "data": [{"code": "failed", "message": _said(error), "line": None, "param": None}],
            }
            self._change(name, status="failed", failed_at=int(time.time()), errors=errors)

    def _answer(self, name: str) -> None:
        """Answer a batch, or continue it, and write its files."""
        record = self.store.read(name)
        path = self.store.path(record["input_file_id"])
        source = OpenAIBatchSource(path, record["endpoint"], self._serving.adapters)
        session, folder = self._serving.session, self.store.folder / f"{name}.parquet"
        counts = {"total": source.count(), "completed": 0, "failed": 0}

        def tick(rows: int, errors: int) -> None:
            changed = {"total": counts["total"], "completed": rows - errors, "failed": errors}
            if changed != counts:
                counts.update(changed)
                self._change(name, request_counts=dict(counts))
            if self._stopping.is_set() or self.store.read(name)["status"] == "cancelling":
                raise _Ended("the server stopped, or the batch was cancelled")

        if record["status"] != "cancelling":
            self._change(name, status="in_progress", in_progress_at=int(time.time()), request_counts=dict(counts))
            spec = BatchSpec(sampling=self._serving.batch_sampling(PRIORITY))
            with contextlib.suppress(_Ended):
                Job(session, source, spec).write(Target(folder), False, False, tick)
        cancelled = self.store.read(name)["status"] == "cancelling"
        if self._stopping.is_set() and not cancelled:
            raise _Ended
        if not cancelled:
            self._change(name, status="finalizing", finalizing_at=int(time.time()))
        files = self._written(name, folder, record[OWNER])
        end = "cancelled" if cancelled else "completed"
        self._change(name, status=end, **{f"{end}_at": int(time.time())}, **files)
        shutil.rmtree(folder, ignore_errors=True)

    def _written(self, name: str, folder: Path, owner: str) -> dict[str, str]:
        """Write the files of answers and of errors; one that would be empty is not written."""
        if not folder.exists():
            return {}
        table = pq.read_table(folder, partitioning=None)
        failed = pc.is_valid(table.column("error"))
        found = {}
        for kind, rows in (("output", table.filter(pc.invert(failed))), ("error", table.filter(failed))):
            if rows.num_rows:
                found[f"{kind}_file_id"] = self._file(f"{name}_{kind}.jsonl", rows, owner)
        return found

    def _file(self, name: str, rows: pa.Table, owner: str) -> str:
        unfinished = self.store.folder / f"{name}.unfinished"
        try:
            with private(unfinished) as file:
                write_openai_answers(rows, self._serving.names[0], file)
                file.seek(0)
                record = self.store.add_file(file, name, "batch_output", owner)
        finally:
            unfinished.unlink(missing_ok=True)
        return str(record["id"])

    def _change(self, name: str, **changes: Any) -> None:
        with self._lock:
            record = self.store.read(name)
            if record["status"] == "cancelling" and changes.get("status") in ("in_progress", "finalizing"):
                del changes["status"]  # it was cancelled in the meantime
            self._note(record, **changes)

    def _note(self, record: dict[str, Any], **changes: Any) -> dict[str, Any]:
        self.store.write(changed := record | changes)
        return changed


def _said(error: Exception) -> str:
    """Why a batch failed, for its client."""
    if isinstance(error, OSError) and error.strerror:
        return f"the server's files: {error.strerror}"
    return in_words(error) if isinstance(error, DistKVError) else "the server failed: see its log"
