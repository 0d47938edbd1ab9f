"""Parquet files and folders of them: one schema for all files, each read on its own, row group by row group."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distkv_dask.client.batch.column_types import decoded, widened
from distkv_dask.client.batch.hive import folder_columns
from distkv_dask.client.batch.tables import CHUNK, Chunk, Columns, TableSource, arrow_chunks, errors_chunk
from distkv_dask.client.files import label_of, open_file
from distkv_dask.errors import SourceError

SUFFIXES = (".parquet", ".pq")

_BROKEN = (pa.ArrowException, OSError, ValueError, OverflowError, KeyError, MemoryError)


@dataclass(frozen=True, slots=True)
class _File:
    """A file, looked at: how many rows it has (one, for the error, if it cannot be read), and its columns.

    ``folders`` are the columns that its Hive partition gives, ``int96`` those that are stored as INT96.
    """

    path: Path
    label: str
    folders: Mapping[str, Any]
    rows: int = 1
    schema: pa.Schema = field(default_factory=lambda: pa.schema([]))
    int96: tuple[str, ...] = ()
    error: str | None = None


def parquet_source(root: Path, paths: list[Path], columns: Columns) -> TableSource:
    """Open Parquet files as one table; those that cannot be read are one error row each.

    Parameters
    ----------
    root
        The folder whose subfolders may be Hive partitions (``year=2024/``), or the only file.
    paths
        The files.
    columns
        Which columns are looked at.

    Raises
    ------
    SourceError
        When none of them can be read, or a column is missing.
    """
    folders = folder_columns(root, paths) if root.is_dir() else [{}]
    files = [_looked_at(path, root, given) for path, given in zip(paths, folders, strict=True)]
    if all(file.error for file in files):
        raise SourceError(f"{root} cannot be read as Parquet: {files[0].error}")
    schema = _one_schema(files)

    def chunks(kept: pa.Schema) -> Iterator[Chunk]:
        needed = list(dict.fromkeys((*kept.names, *(name for name in columns.template if name in schema.names))))
        for file in files:
            yield from _chunks(file, needed, columns, kept)

    return TableSource(chunks, columns, schema, lambda: sum(file.rows for file in files))


def _looked_at(path: Path, root: Path, folders: Mapping[str, Any]) -> _File:
    file = _File(path, label_of(path.relative_to(root if path != root else root.parent)), folders)
    try:
        with _opened(path) as found:
            leaves = [found.schema.column(at) for at in range(len(found.schema))]
            int96 = tuple(leaf.path for leaf in leaves if leaf.physical_type == "INT96")
            return replace(file, rows=found.metadata.num_rows, schema=found.schema_arrow, int96=int96)
    except _BROKEN as error:
        return replace(file, error=f"file {file.label} cannot be read: {error}")


def _opened(path: Path, unit: str = "us") -> pq.ParquetFile:
    """Open a file; nothing is read ahead. INT96 is read in microseconds: nanoseconds end in the year 2262."""
    open_file(path).close()
    source = pa.OSFile(os.fsencode(path))  # pyarrow takes no names that are not UTF-8, but bytes
    return pq.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20, coerce_int96_timestamp_unit=unit)


def _one_schema(files: list[_File]) -> pa.Schema:
    """The columns of all files, widened; where no type holds a column of two files, it keeps the first one's."""
    found: dict[str, pa.Field] = {}
    twice: dict[str, pa.Field] = {}
    for file in files:
        for name, column in zip(file.schema.names, file.schema, strict=True):
            if file.schema.names.count(name) > 1:
                twice[name] = column
            known = found.get(name)
            kind = decoded(column.type) if known is None else widened(known.type, column.type) or known.type
            found[name] = (known or column).with_type(kind)
    for file in files:
        for name, value in file.folders.items():
            if name not in found or pa.types.is_null(found[name].type):
                found[name] = pa.field(name, pa.array([value]).type)
    return pa.schema([*found.values(), *twice.values()])


def _chunks(file: _File, needed: list[str], columns: Columns, kept: pa.Schema) -> Iterator[Chunk]:
    """Read a file; a row group that is damaged costs its own rows."""
    if file.error is not None:
        yield errors_chunk(file.error, 1, kept)
        return
    done, groups = 0, [file.rows]
    try:
        with _opened(file.path) as found, _opened(file.path, "ns") as precise:
            groups = [found.metadata.row_group(at).num_rows for at in range(found.metadata.num_row_groups)]
            while groups:
                at, done = found.metadata.num_row_groups - len(groups), 0
                try:
                    for chunk in _group_chunks(file, found, precise, at, needed, columns, kept):
                        yield chunk
                        done += len(chunk.values)
                except _BROKEN as error:
                    yield from _lost(file, groups[0] - done, error, kept)
                del groups[0]
    except _BROKEN as error:
        yield from _lost(file, sum(groups) - done, error, kept)


def _group_chunks(
    file: _File,
    found: pq.ParquetFile,
    precise: pq.ParquetFile,
    group: int,
    needed: list[str],
    columns: Columns,
    kept: pa.Schema,
) -> Iterator[Chunk]:
    names = [name for name in needed if name in file.schema.names]
    int96 = [name for name in names if name in file.int96]
    how = {"batch_size": CHUNK, "row_groups": [group], "use_threads": False}
    exact = precise.iter_batches(columns=int96, **how) if int96 else None
    for batch in found.iter_batches(columns=names, **how):
        for name in needed:
            if name in file.folders and name not in names:
                value = pa.array([file.folders[name]] * batch.num_rows)
                batch = batch.append_column(name, value) if batch.num_columns else pa.record_batch({name: value})
        if not batch.num_columns:
            batch = pa.RecordBatch.from_struct_array(pa.array([{}] * batch.num_rows, pa.struct([])))
        batch, cut = (batch, {}) if exact is None else _cut_off(batch, next(exact))
        for chunk in arrow_chunks([batch], columns, kept):
            yield chunk._replace(values=[cut.get(at, values) for at, values in enumerate(chunk.values)])


def _cut_off(batch: pa.RecordBatch, precise: pa.RecordBatch) -> tuple[pa.RecordBatch, dict[int, str]]:
    """Take out INT96 times that have nanoseconds, which microseconds cut off; returns errors of their rows too."""
    cut: dict[int, str] = {}
    for name in precise.schema.names:
        times = batch.column(name)
        micros, nanos = times.cast(pa.int64()), precise.column(name).cast(pa.int64())
        whole = pc.equal(pc.multiply(micros, 1000), nanos)  # both wrap around alike beyond the range of nanoseconds
        batch = batch.set_column(batch.schema.get_field_index(name), name, pc.if_else(whole, times, None))
        cut |= {
            at: f"column {name!r} holds an INT96 time with nanoseconds, which are not kept: {times[at]}..."
            for at, same in enumerate(whole.to_pylist())
            if same is False
        }
    return batch, cut


def _lost(file: _File, rows: int, error: BaseException, kept: pa.Schema) -> Iterable[Chunk]:
    message = f"file {file.label} cannot be read: {error}"
    left = min(rows, file.path.stat().st_size if file.path.exists() else rows)  # what is damaged may claim any number
    for start in range(0, left, CHUNK):
        yield errors_chunk(message, min(CHUNK, left - start), kept)
