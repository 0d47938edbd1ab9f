"""A batch's output: a folder of Parquet files that can be read at any time and that survives any crash.

Rows that are answered go to a journal at once (an Arrow IPC stream, synced to disk). From time to time the journal
becomes a Parquet file: written under a hidden name, synced, renamed. A journal that a crash left behind becomes one
when the output is opened again; if its Parquet file is there already, it is thrown away. Names that begin with ``_``
are skipped by everything that reads Parquet folders.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import filelock
import pyarrow as pa
import pyarrow.parquet as pq

from distkv_dask.client.batch.rows import Row
from distkv_dask.errors import OutputError

MANIFEST, LOCK, JOURNAL, UNFINISHED = "_distkv.json", "_lock", "_journal-", "_unfinished-"

RESULT = pa.schema(
    [
        ("question", pa.string()),
        ("answer", pa.string()),
        ("finish_reason", pa.string()),
        ("error", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("new_tokens", pa.int64()),
        ("reused_tokens", pa.int64()),
        ("parts", pa.int64()),
        ("dropped_tokens", pa.int64()),
        ("seconds", pa.float64()),
        ("fingerprint", pa.string()),
    ]
)
"""Columns that follow the label and the columns kept of the source."""

PART_ROWS = 10_000
"""Rows after which a journal becomes a Parquet file."""

PART_AGE = 2.0, 0.03
"""Seconds, and share of the time since the output was opened: the older of both makes a journal a Parquet file."""


class Output:
    """The output folder of a batch, locked while it is open.

    Parameters
    ----------
    path
        The folder; made if it is not there.
    schema
        Label, columns kept of the source, :data:`RESULT`, and those of the answers' JSON schema.
    parameters
        All that answers depend on; an output that was begun with others is refused.
    retry_errors
        Drop the rows with errors of earlier runs, so that they are done again.

    Raises
    ------
    OutputError
        When the folder is something else, belongs to a job with other parameters, or is being written to.
    """

    def __init__(
        self, path: Path, schema: pa.Schema, parameters: Mapping[str, Any], retry_errors: bool = False
    ) -> None:
        self.path = path
        self.done: dict[tuple[int | str, str | None], str] = {}
        """(label, question) -> fingerprint of all rows that are there."""
        self.errors = 0
        """How many of them have errors."""
        self._schema = schema
        self._sink: Any = None
        self._writer: Any = None
        self._rows = 0
        self._opened = time.monotonic()
        self._lock = _locked(path)
        try:
            self._check(parameters)
            self._repair()
            self._look(retry_errors)
        except BaseException:
            self._lock.release()
            raise

    def append(self, batch: pa.RecordBatch) -> None:
        """Add rows; they survive a crash when this returns."""
        if self._writer is None:
            self._sink = (self.path / f"{JOURNAL}{self._number:06}").open("wb")
            self._writer = pa.ipc.new_stream(self._sink, self._schema)
            self._rows, self._began = 0, time.monotonic()
        self._writer.write_batch(batch)
        self._sink.flush()
        os.fsync(self._sink.fileno())
        self._rows += batch.num_rows
        self.rotate()

    def rotate(self, now: bool = False) -> None:
        """Make the journal a Parquet file if it is time."""
        if self._writer is None:
            return
        clock = time.monotonic()
        due = clock - self._began >= max(PART_AGE[0], PART_AGE[1] * (clock - self._opened))
        if now or due or self._rows >= PART_ROWS:
            self._writer.close()
            self._sink.close()
            self._writer = None
            self._publish(self.path / f"{JOURNAL}{self._number:06}")
            self._number += 1

    def close(self) -> None:
        """Make everything readable and let others write."""
        self.rotate(now=True)
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check(self, parameters: Mapping[str, Any]) -> None:
        """Compare with the manifest, or write it."""
        manifest = self.path / MANIFEST
        wanted = {**parameters, "columns": {field.name: str(field.type) for field in self._schema}}
        if manifest.exists():
            found = json.loads(manifest.read_text())["parameters"]
            if changed := _differences(found, wanted):
                raise OutputError(
                    f"{self.path} was begun with other parameters ({'; '.join(changed)}). Repeat the command as it was "
                    f"to continue, or choose another output."
                )
            return
        if others := sorted(p.name for p in self.path.iterdir() if not p.name.startswith((LOCK, UNFINISHED))):
            raise OutputError(f"{self.path} is no output of distkv (it holds {others[0]}): choose another one")
        _write_file(manifest, json.dumps({"distkv": 1, "parameters": wanted}, indent=1).encode())

    def _repair(self) -> None:
        """Bring what a crash may have left behind into order."""
        for left in self.path.glob(f"{UNFINISHED}*"):
            left.unlink()
        for journal in sorted(self.path.glob(f"{JOURNAL}*")):
            self._publish(journal)
        self._number = max((int(part.stem.removeprefix("part-")) for part in self._parts()), default=-1) + 1
        if not self._number:  # an empty one, so that there is something to read from the first moment
            self._write(self._schema.empty_table(), self.path / "part-000000.parquet")
            self._number = 1

    def _look(self, retry_errors: bool) -> None:
        """Learn which rows are there."""
        for part in self._parts():
            columns = [self._schema[0].name, "question", "fingerprint", "error"]
            table = pq.read_table(part, columns=columns)
            failed = table.num_rows - table.column("error").null_count
            if failed and retry_errors:
                whole = pq.read_table(part)
                self._write(whole.filter(whole.column("error").is_null()), part)
                table, failed = table.filter(table.column("error").is_null()), 0
            self.errors += failed
            labels, questions, prints = (table.column(name).to_pylist() for name in columns[:3])
            self.done.update(zip(zip(labels, questions, strict=True), prints, strict=True))

    def _parts(self) -> list[Path]:
        return sorted(self.path.glob("part-*.parquet"))

    def _publish(self, journal: Path) -> None:
        part = self.path / f"part-{journal.name.removeprefix(JOURNAL)}.parquet"
        if not part.exists() and (batches := _recovered(journal)):
            self._write(pa.Table.from_batches(batches, self._schema), part)
        journal.unlink()

    def _write(self, table: pa.Table, part: Path) -> None:
        unfinished = part.with_name(UNFINISHED + part.name)
        pq.write_table(table, unfinished)
        _put(unfinished, part)


def result_batch(schema: pa.Schema, rows: Sequence[tuple[Row, Mapping[str, Any]]]) -> pa.RecordBatch:
    """Return finished rows as one batch of ``schema``; the mappings give its columns from :data:`RESULT` on."""
    kept = [pa.concat_arrays([row.kept.column(at) for row, _ in rows]) for at in range(rows[0][0].kept.num_columns)]
    labels = pa.array([row.label for row, _ in rows], schema[0].type)
    added = [schema.field(at) for at in range(1 + len(kept), len(schema))]
    results = [pa.array([result.get(field.name) for _, result in rows], field.type) for field in added]
    return pa.RecordBatch.from_arrays([labels, *kept, *results], schema=schema)


def _locked(path: Path) -> filelock.FileLock:
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file, but an output is a folder of Parquet files: choose another path")
    path.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path / LOCK, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise OutputError(f"{path} is being written to by another process: wait for it, or end it first") from None
    return lock


def _recovered(journal: Path) -> list[pa.RecordBatch]:
    """Return all batches that were written whole; what a crash cut off is lost."""
    batches: list[pa.RecordBatch] = []
    try:
        with pa.ipc.open_stream(journal.read_bytes()) as stream:
            batches.extend(stream)
    except (pa.ArrowException, OSError, EOFError):
        pass  # the end of what was written
    return batches


def _write_file(path: Path, data: bytes) -> None:
    unfinished = path.with_name(UNFINISHED + path.name)
    unfinished.write_bytes(data)
    _put(unfinished, path)


def _put(unfinished: Path, path: Path) -> None:
    """Give a file that was written its name, in an order that no crash of the machine can turn around."""
    for synced, then in ((unfinished, lambda: unfinished.replace(path)), (path.parent, lambda: None)):
        descriptor = os.open(synced, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        then()


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], path: str = "") -> list[str]:
    changed = []
    for name in {**found, **wanted}:
        then, now = found.get(name), wanted.get(name)
        if isinstance(then, dict) and isinstance(now, dict):
            changed += _differences(then, now, f"{path}{name}.")
        elif then != now:
            changed.append(f"{path}{name} was {then!r:.100}, is {now!r:.100}")
    return changed
