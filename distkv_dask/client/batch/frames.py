"""pandas frames, Dask DataFrames and Dask Bags as chunks; Dask collections are computed one partition at a time."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
from distributed import Client

from distkv_dask.client.batch.tables import CHUNK, Chunk, Columns, arrow_chunks, inferred, record_chunks


def frame_schema(frame: Any, text_column: str) -> pa.Schema:
    """Types of a pandas frame's columns; those of mixed values, or of which nothing is known, become text."""
    fields = []
    for name in frame.columns:
        try:
            kind = pa.array(frame[name], from_pandas=True).type
        except (pa.ArrowException, TypeError, ValueError):
            kind = pa.string()
        text = name == text_column or pa.types.is_null(kind) or pa.types.is_large_string(kind)
        fields.append((str(name), pa.string() if text else kind))
    return pa.schema(fields)


def frame_chunks(frame: Any, columns: Columns, schema: pa.Schema) -> Iterator[Chunk]:
    """Cut a pandas frame into chunks; one that does not fit Arrow as it is goes record by record."""
    for start in range(0, len(frame), CHUNK):
        part = frame.iloc[start : start + CHUNK]
        try:
            table = pa.Table.from_pandas(part, schema, preserve_index=False)
        except (pa.ArrowException, TypeError, ValueError):
            yield from record_chunks(part.to_dict("records"), columns, schema)
        else:
            yield from arrow_chunks(table.combine_chunks().to_batches(), columns)


def dask_frame_chunks(frame: Any, columns: Columns, schema: pa.Schema, client: Client) -> Iterator[Chunk]:
    """Compute the partitions of a Dask DataFrame in turn, and cut each into chunks."""
    for partition in _computed(frame, client):
        yield from frame_chunks(partition, columns, schema)


def bag_schema(bag: Any, text_column: str, client: Client) -> pa.Schema:
    """Types of the first items of a Bag."""
    return inferred(_bag_records(bag, text_column, client), text_column)


def bag_chunks(bag: Any, columns: Columns, schema: pa.Schema, client: Client) -> Iterator[Chunk]:
    """Compute the partitions of a Dask Bag of texts or records in turn, and cut each into chunks."""
    return record_chunks(_bag_records(bag, columns.text, client), columns, schema)


def _bag_records(bag: Any, text_column: str, client: Client) -> Iterator[Mapping[str, Any]]:
    return as_records(itertools.chain.from_iterable(_computed(bag, client)), text_column)


def as_records(items: Iterable[Any], text_column: str) -> Iterator[Mapping[str, Any]]:
    """Texts or records as records."""
    return (item if isinstance(item, Mapping) else {text_column: item} for item in items)


def _computed(collection: Any, client: Client) -> Iterator[Any]:
    """Results of the partitions; the next one is computed while one is looked at."""
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
