"""A batch's output: a folder of Parquet files that can be read at any time and that survives any crash.

Answered rows go to a journal at once (:mod:`distkv_dask.client.batch.journal`), which is synced to disk. From time to
time the journal becomes a Parquet file: written under a hidden name, synced, renamed. A journal left by a crash becomes
one when the output is opened again, or is deleted if its Parquet file already exists. All files have digests, so that
damage is found. The batch's parameters are in the manifest and in every Parquet file. Readers of Parquet folders skip
names that begin with ``_``.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import filelock
import pyarrow as pa
import pyarrow.parquet as pq

from distkv_dask.client.batch.journal import Journal, recovered
from distkv_dask.client.batch.manifest import begin_or_check, begun_with, keep_record, manifest, recorded
from distkv_dask.client.batch.parts import BEGUN, LOCK, UNFINISHED, Parts
from distkv_dask.client.batch.readme import in_words
from distkv_dask.errors import OutputError

logger = logging.getLogger("distributed.distkv.batch")

JOURNAL = "_journal-"

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
"""Columns after the label and the source's columns."""

PART_ROWS = 10_000
"""Rows after which a journal becomes a Parquet file."""

PART_AGE = 2.0, 0.03
"""Seconds, and share of the time since the output was opened: a journal older than both becomes a Parquet file."""


class Output:
    """The output folder of a batch, locked while it is open.

    Parameters
    ----------
    path
        The folder; made if it does not exist.
    schema
        Label, columns kept of the source, :data:`RESULT`, and those of the answers' JSON schema.
    parameters
        All that answers depend on; an output with other parameters is refused.
    retry_errors
        Drop rows with errors of earlier runs, so that they are answered again.

    Raises
    ------
    OutputError
        When the folder is something else, cannot be written, is damaged, belongs to a job with other parameters, or is
        being written to.
    """

    def __init__(
        self, path: Path, schema: pa.Schema, parameters: Mapping[str, Any], retry_errors: bool = False
    ) -> None:
        self.path = path
        self.done: dict[tuple[int | str, str | None], str] = {}
        """(label, question) -> fingerprint of all rows in the output."""
        self.errors = 0
        """How many of them have errors."""
        self._journal: Journal | None = None
        self._opened = time.monotonic()
        self._begun = begun = begun_with(schema, parameters)
        self._schema = schema.with_metadata({BEGUN: manifest(begun)})
        with self._writing():
            self._lock = locked(path)
        try:
            with self._writing():
                self._parts = Parts(path)
                begin_or_check(path, begun)
                self._repair()
                self._look(retry_errors)
                self.recorded = recorded(path)
                """The record of earlier runs."""
        except BaseException:
            self._lock.release()
            raise

    def append(self, batch: pa.RecordBatch) -> None:
        """Add rows; they survive a crash when this returns.

        Raises
        ------
        OutputError
            They cannot be written: the disk is full, for instance. Earlier rows are kept.
        """
        with self._writing():
            if self._journal is None:
                self._journal = Journal(self._journal_path(self._number), self._schema)
            self._journal.append(batch)
            self.rotate()

    @property
    def parts(self) -> Iterable[Path]:
        """The Parquet files; rows of the journal are not in them yet."""
        return self._parts

    def keep(self, record: Mapping[str, Any]) -> None:
        """Keep the record of the batch with its answers; raises as :meth:`append` does."""
        with self._writing():
            keep_record(self.path, self._begun, record, in_words(self._begun, record))

    def rotate(self, now: bool = False) -> None:
        """Make the journal a Parquet file if it is time; raises as :meth:`append` does."""
        if (journal := self._journal) is None:
            return
        clock = time.monotonic()
        due = clock - journal.began >= max(PART_AGE[0], PART_AGE[1] * (clock - self._opened))
        if now or due or journal.rows >= PART_ROWS:
            with self._writing():
                journal.close()
                self._publish(journal.path, self._number)
                self._journal = None
                self._number += 1

    def close(self) -> None:
        """Make everything readable and let others write; raises as :meth:`append` does."""
        try:
            self.rotate(now=True)
        finally:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Raise the error; a journal that may be torn is repaired when the output is opened again."""
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            if self._journal is not None:
                self._journal.abandon()
                self._journal = None
            raise OutputError(
                f"{self.path} cannot be written: {error}. What was answered so far is kept; repeat the command when "
                f"there is room and permission, or choose another output."
            ) from error

    def _journal_path(self, number: int) -> Path:
        return self.path / f"{JOURNAL}{number:06}"

    def _repair(self) -> None:
        """Repair what a crash may have left behind."""
        for left in self.path.glob(f"{UNFINISHED}*"):
            left.unlink()
        for journal in sorted(self.path.glob(f"{JOURNAL}*")):
            if (number := journal.name.removeprefix(JOURNAL)).isdecimal():
                self._publish(journal, int(number))
        self._parts.check()
        self._number = self._parts.next_number()
        if not self._number:  # an empty one, so that the output can be read from the start
            self._parts.write(self._schema.empty_table(), self._parts.path(0))
            self._number = 1

    def _look(self, retry_errors: bool) -> None:
        """Read which rows exist."""
        for part in self._parts:
            columns = [self._schema[0].name, "question", "fingerprint", "error"]
            table = pq.read_table(part, columns=columns, partitioning=None)
            failed = table.num_rows - table.column("error").null_count
            if failed and retry_errors:
                whole = pq.read_table(part, partitioning=None)
                self._parts.write(whole.filter(whole.column("error").is_null()), part)
                table, failed = table.filter(table.column("error").is_null()), 0
            self.errors += failed
            labels, questions, prints = (table.column(name).to_pylist() for name in columns[:3])
            before = len(self.done)
            self.done.update(zip(zip(labels, questions, strict=True), prints, strict=True))
            if len(self.done) < before + table.num_rows:
                raise OutputError(f"{part} holds rows twice, or some that other files hold too: delete one of them")

    def _publish(self, journal: Path, number: int) -> None:
        part = self._parts.path(number)
        if not part.exists() or not self._parts.is_whole(part):
            batches, whole = recovered(journal, self._schema)
            if not whole:
                logger.warning(
                    "%s ends within a row or is damaged: %d rows of it are whole, others are answered again",
                    journal,
                    sum(batch.num_rows for batch in batches),
                )
            if batches:
                self._parts.write(pa.Table.from_batches(batches, self._schema), part)
        journal.unlink()


def locked(path: Path) -> filelock.FileLock:
    """Make the folder of an output and lock it.

    Raises
    ------
    OutputError
        It is a file, or somebody else has locked it.
    OSError
        It cannot be made.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file, but an output is a folder of Parquet files: choose another path")
    path.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path / LOCK, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise OutputError(f"{path} is being written to by another process: wait for it, or end it first") from None
    except NotImplementedError as error:
        raise OutputError(f"the file system of {path} has no locks: choose an output on another one") from error
    return lock
