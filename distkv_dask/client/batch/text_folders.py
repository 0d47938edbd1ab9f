"""CSV or JSONL files as one table: the columns of all files, and an error row for each unreadable file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from distkv_dask.client.batch.hive import folder_columns
from distkv_dask.client.batch.tables import Columns, Record, TableSource, inferred, record_chunks
from distkv_dask.client.batch.text_tables import csv_header, csv_records, jsonl_records
from distkv_dask.errors import SourceError


def csv_source(root: Path, paths: list[Path], columns: Columns) -> TableSource:
    """Open CSV files as one table, whose values are all text.

    Raises
    ------
    SourceError
        When none of them can be read, or a column is missing.
    """
    folders = [{n: None if value is None else str(value) for n, value in one.items()} for one in _folders(root, paths)]
    read = partial(_records, paths, folders, partial(csv_records, text_column=columns.text))
    fields: dict[str, pa.Field] = {}
    twice: list[pa.Field] = []
    wrong: list[SourceError] = []
    for path, given in zip(paths, folders, strict=True):
        try:
            header = csv_header(path, columns.text)
        except SourceError as error:
            wrong.append(error)
            continue
        for name in (*header, *given):
            fields[name] = pa.field(name, pa.string())
        twice += [pa.field(name, pa.string()) for name in set(header) if header.count(name) > 1]
    if not fields:
        raise wrong[0] if wrong else SourceError(f"{root} is empty: a CSV file needs a line of column names first")
    return _source(read, columns, pa.schema([*fields.values(), *twice]), lambda: sum(1 for _ in read()))


def jsonl_source(root: Path, paths: list[Path], columns: Columns) -> TableSource:
    """Open JSONL files as one table; all of them are read once to learn the types of their columns.

    Raises
    ------
    SourceError
        When a column is missing.
    """
    read = partial(_records, paths, _folders(root, paths), jsonl_records)
    schema, rows = inferred(read(), columns.text)
    return _source(read, columns, schema, lambda: rows)


def _source(
    read: Callable[[], Iterator[Record]], columns: Columns, schema: pa.Schema, count: Callable[[], int]
) -> TableSource:
    return TableSource(lambda kept: record_chunks(read(), columns, kept, schema.names), columns, schema, count)


def _records(
    paths: list[Path], folders: Sequence[Mapping[str, Any]], reader: Callable[[Path], Iterator[Record]]
) -> Iterator[Record]:
    """All files' records, with the columns from their folder names."""
    for path, given in zip(paths, folders, strict=True):
        try:
            for record in reader(path):
                yield {**given, **record} if given and not isinstance(record, str) else record
        except SourceError as error:
            yield str(error)


def _folders(root: Path, paths: list[Path]) -> list[Mapping[str, int | str | None]]:
    return folder_columns(root, paths) if root.is_dir() else [{}] * len(paths)
