"""Parquet files and folders of them: one schema for all files, each read separately, row group by row group."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from distkv_dask.client.batch.column_types import decoded, widened
from distkv_dask.client.batch.hive import folder_columns
from distkv_dask.client.batch.int96 import TimeReader, open_parquet
from distkv_dask.client.batch.tables import CHUNK, Chunk, Columns, TableSource, arrow_chunks, errors_chunk
from distkv_dask.client.files import label_of
from distkv_dask.errors import SourceError

SUFFIXES = (".parquet", ".pq")

_BROKEN = (pa.ArrowException, OSError, ValueError, OverflowError, KeyError, MemoryError)


@dataclass(frozen=True, slots=True)
class _File:
    """A file's columns and number of rows (one, for the error, if it cannot be read).

    ``folders`` are the columns that its Hive partition gives.
    """

    path: Path
    label: str
    folders: Mapping[str, Any]
    rows: int = 1
    schema: pa.Schema = field(default_factory=lambda: pa.schema([]))
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
        The columns that are used.

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
        with open_parquet(path) as found:
            return replace(file, rows=found.metadata.num_rows, schema=found.schema_arrow)
    except _BROKEN as error:
        return replace(file, error=f"file {file.label} cannot be read: {error}")


def _one_schema(files: list[_File]) -> pa.Schema:
    """The columns of all files, widened; a column without a common type keeps the type of the first file."""
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
    """Read a file; the rows of a damaged row group are errors."""
    if file.error is not None:
        yield errors_chunk(file.error, 1, kept)
        return
    done, groups = 0, [file.rows]
    try:
        with TimeReader(file.path) as reader:
            about = reader.file.metadata
            groups = [about.row_group(at).num_rows for at in range(about.num_row_groups)]
            while groups:
                at, done = about.num_row_groups - len(groups), 0
                try:
                    for chunk in _group_chunks(file, reader, at, needed, columns, kept):
                        yield chunk
                        done += len(chunk.values)
                except _BROKEN as error:
                    yield from _lost(file, groups[0] - done, error, kept)
                del groups[0]
    except _BROKEN as error:
        yield from _lost(file, sum(groups) - done, error, kept)


def _group_chunks(
    file: _File, reader: TimeReader, group: int, needed: list[str], columns: Columns, kept: pa.Schema
) -> Iterator[Chunk]:
    names = [name for name in needed if name in file.schema.names]
    for batch, wrong in reader.batches(names, batch_size=CHUNK, row_groups=[group], use_threads=False):
        for name in needed:
            if name in file.folders and name not in names:
                value = pa.array([file.folders[name]] * batch.num_rows)
                batch = batch.append_column(name, value) if batch.num_columns else pa.record_batch({name: value})
        if not batch.num_columns:
            batch = pa.RecordBatch.from_struct_array(pa.array([{}] * batch.num_rows, pa.struct([])))
        for chunk in arrow_chunks([batch], columns, kept):
            yield chunk._replace(values=[wrong.get(at, values) for at, values in enumerate(chunk.values)])


def _lost(file: _File, rows: int, error: BaseException, kept: pa.Schema) -> Iterable[Chunk]:
    message = f"file {file.label} cannot be read: {error}"
    left = min(rows, file.path.stat().st_size if file.path.exists() else rows)  # damaged metadata may claim any number
    for start in range(0, left, CHUNK):
        yield errors_chunk(message, min(CHUNK, left - start), kept)
