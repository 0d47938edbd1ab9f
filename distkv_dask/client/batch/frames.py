"""pandas frames, Dask DataFrames and Dask Bags as chunks; Dask collections are computed one partition at a time."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
from distributed import Client

from distkv_dask.client.batch.column_types import SAMPLE, ColumnType, fitted, is_json, json_field, parquet_refuses
from distkv_dask.client.batch.tables import (
    CHUNK,
    Chunk,
    Columns,
    Record,
    chunk_of,
    errors_chunk,
    inferred,
    record_chunks,
)


def frame_schema(frame: Any, text_column: str) -> pa.Schema:
    """Types of a pandas frame's columns; objects of several kinds become JSON texts."""
    return pa.schema(
        [_field(frame.iloc[:, at], str(name), text_column, whole=True) for at, name in enumerate(frame.columns)]
    )


def dask_frame_schema(frame: Any, text_column: str) -> pa.Schema:
    """Types of a Dask DataFrame's columns, from its metadata: columns of objects become JSON texts."""
    meta = frame._meta_nonempty
    return pa.schema(
        [_field(meta.iloc[:, at], str(name), text_column, whole=False) for at, name in enumerate(meta.columns)]
    )


def frame_chunks(frame: Any, columns: Columns, kept: pa.Schema) -> Iterator[Chunk]:
    """Cut a pandas frame into chunks; if it lacks a column that others have, all its rows are errors."""
    places = {str(name): at for at, name in enumerate(frame.columns)}
    fields = {field.name: field for field in kept}
    missing = sorted(fields.keys() - places.keys())
    names = [name for name in fields.keys() | set(columns.template) if name in places]
    for start in range(0, len(frame), CHUNK):
        part = frame.iloc[start : start + CHUNK]
        if missing:
            yield errors_chunk(f"the row's partition has no column {missing[0]!r}", len(part), kept)
            continue
        wanted = {name: _column(part.iloc[:, places[name]], fields.get(name)) for name in names}
        yield chunk_of(wanted, len(part), columns, kept)


def dask_frame_chunks(frame: Any, columns: Columns, kept: pa.Schema, client: Client) -> Iterator[Chunk]:
    """Compute the partitions of a Dask DataFrame one by one, and cut each into chunks."""
    for partition in _computed(frame, client):
        yield from frame_chunks(partition, columns, kept)


def bag_schema(bag: Any, text_column: str, client: Client) -> pa.Schema:
    """Types of the first items of a Bag."""
    return inferred(itertools.islice(_bag_records(bag, text_column, client), SAMPLE), text_column)[0]


def bag_chunks(bag: Any, columns: Columns, schema: pa.Schema, kept: pa.Schema, client: Client) -> Iterator[Chunk]:
    """Compute the partitions of a Dask Bag of texts or records one by one, and cut each into chunks."""
    return record_chunks(_bag_records(bag, columns.text, client), columns, kept, schema.names)


def _bag_records(bag: Any, text_column: str, client: Client) -> Iterator[Record]:
    return as_records(itertools.chain.from_iterable(_computed(bag, client)), text_column)


def as_records(items: Iterable[Any], text_column: str) -> Iterator[Record]:
    """Texts or records as records, whose keys are texts."""
    for item in items:
        if not isinstance(item, Mapping):
            yield {text_column: item}
        elif all(isinstance(name, str) and name.isascii() for name in item):
            yield item
        else:
            yield _named(item)


def _named(item: Mapping[Any, Any]) -> Record:
    named = {str(name): value for name, value in item.items()}
    if len(named) < len(item):
        return f"two keys of the record are the same text: {sorted(map(str, item))!r:.200}"
    try:
        "".join(named).encode()
    except UnicodeEncodeError:
        return f"a key of the record is not text: {list(named)!r:.200}"
    return named


def _field(series: Any, name: str, text_column: str, whole: bool) -> pa.Field:
    """The type of a pandas column; with ``whole``, no other partition can have more values."""
    if name == text_column:
        return pa.field(name, pa.string())
    try:
        if series.dtype == object:
            return _objects_field(_values(series), name) if whole else json_field(name)
        kind = pa.array(series, from_pandas=True).type
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return json_field(name)
    return pa.field(name, pa.string() if pa.types.is_null(kind) or pa.types.is_large_string(kind) else kind)


def _objects_field(values: list[Any], name: str) -> pa.Field:
    try:
        field = pa.field(name, pa.array(values).type)
        if not pa.types.is_null(field.type) and not fitted(values, field)[1] and parquet_refuses(field) is None:
            return field
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        pass
    column = ColumnType()
    for value in values:
        column.add(value)
    return column.field(name)


def _column(series: Any, field: pa.Field | None) -> pa.Array | list[Any]:
    """A pandas column as an Arrow array; objects and values that become JSON text as Python values."""
    if series.dtype == object or (field is not None and is_json(field)):
        return _values(series)
    try:
        return pa.array(series, from_pandas=True)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return _values(series)


def _values(series: Any) -> list[Any]:
    """The values of a pandas column as Python values, None for all that pandas calls missing."""
    values: list[Any] = [None if no else one for one, no in zip(series.tolist(), series.isna(), strict=True)]
    return [one.tolist() if hasattr(one, "tolist") else one for one in values]


def _computed(collection: Any, client: Client) -> Iterator[Any]:
    """Results of the partitions; the next one is computed while one is used."""
    parts = iter(collection.to_delayed())
    ahead = [client.compute(part) for part in itertools.islice(parts, 2)]
    while ahead:
        yield _result(ahead.pop(0), client)
        ahead += [client.compute(part) for part in itertools.islice(parts, 1)]


def _result(future: Any, client: Client) -> Any:
    if not client.asynchronous:
        return future.result()
    return asyncio.run_coroutine_threadsafe(_awaited(future.result), client.loop.asyncio_loop).result()  # type: ignore[union-attr]


async def _awaited(ask: Callable[[], Any]) -> Any:
    return await ask()
