"""Tables of other libraries as a source: read as Arrow record batches, a few at a time.

Anything with Arrow's C stream interface is one (https://arrow.apache.org/docs/format/CDataInterface/PyCapsuleInterface.html):
polars, DuckDB, arro3 and many more. Libraries that offer more, such as the number of rows, have their own functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from distkv_dask.client.batch.tables import CHUNK, Columns, TableSource, arrow_chunks
from distkv_dask.errors import SourceError, in_words

_READ_AHEAD = {"batch_readahead": 1, "fragment_readahead": 1}
"""Batches and files that a scan reads ahead: rows may be whole books."""


class Stream(NamedTuple):
    """A table that is read in batches.

    Parameters
    ----------
    schema
        All columns.
    batches
        Starts a pass over the table, given the columns that are needed. A pass may have others, too.
    length
        Returns the number of rows, or None.
    """

    schema: pa.Schema
    batches: Callable[[list[str]], Iterable[pa.RecordBatch]]
    length: Callable[[], int | None] = lambda: None


def is_stream(source: Any) -> bool:
    """Whether an object is a table of another library; nothing is imported."""
    return _opener(source) is not None


def stream_source(source: Any, columns: Columns) -> TableSource:
    """Open a table of another library.

    Raises
    ------
    SourceError
        When it cannot be read, or lacks a column.
    """
    opener = _opener(source)
    assert opener is not None
    try:
        stream = opener(source)
    except Exception as error:  # of any library
        raise SourceError(f"the {type(source).__name__} cannot be read as a table: {in_words(error)}") from error
    needed = _needed(columns, stream.schema)
    return TableSource(
        lambda kept: arrow_chunks(stream.batches(needed), columns, kept), columns, stream.schema, stream.length
    )


def _needed(columns: Columns, schema: pa.Schema) -> list[str]:
    names = (*columns.kept(schema).names, *columns.template)
    return list(dict.fromkeys(name for name in names if name in schema.names))


def _opener(source: Any) -> Callable[[Any], Stream] | None:
    kind = type(source)
    match kind.__module__.split(".")[0], kind.__name__:
        case "datasets", "Dataset" | "IterableDataset":
            return _hugging_face
        case "deltalake", "DeltaTable":
            return lambda table: _dataset(table.to_pyarrow_dataset())
        case "pyiceberg", "Table" | "StaticTable":
            return lambda table: _iceberg(table.scan())
        case "pyiceberg", "DataScan":
            return _iceberg
        case "pyarrow", "Scanner":
            return lambda scanner: Stream(scanner.projected_schema, lambda _: scanner.to_batches())
        case "pyarrow", "RecordBatchReader":
            return lambda reader: Stream(reader.schema, lambda _: _once(reader))
    if kind.__module__ == "pyarrow._dataset" and hasattr(source, "scanner"):
        return _dataset
    return _capsule if hasattr(kind, "__arrow_c_stream__") else None


def _dataset(dataset: Any) -> Stream:
    """A pyarrow dataset; its files are opened one after the other."""
    return Stream(
        dataset.schema,
        lambda names: dataset.to_batches(columns=names, batch_size=CHUNK, **_READ_AHEAD),
        lambda: _if_known(dataset.count_rows),
    )


def _iceberg(scan: Any) -> Stream:
    """A scan of an Iceberg table, which reads one snapshot."""
    return Stream(
        scan.to_arrow_batch_reader().schema,
        lambda names: scan.select(*names).to_arrow_batch_reader() if names else scan.to_arrow_batch_reader(),
        scan.count,
    )


def _hugging_face(dataset: Any) -> Stream:
    """A dataset of Hugging Face, in memory, on disk or streamed."""
    arrow = dataset.with_format("arrow")
    schema = dataset.features.arrow_schema if dataset.features is not None else _first_schema(arrow)
    rows = None if type(dataset).__name__ == "IterableDataset" else len(dataset)

    def batches(names: list[str]) -> Iterator[pa.RecordBatch]:
        chosen = arrow.select_columns(names) if names else arrow
        for table in chosen.iter(CHUNK):
            yield from table.to_batches()

    return Stream(schema, batches, lambda: rows)


def _first_schema(arrow: Any) -> pa.Schema:
    """Columns of the first rows of a dataset that does not say which it has."""
    return next((table.schema for table in arrow.iter(CHUNK)), pa.schema([]))


def _capsule(source: Any) -> Stream:
    """Anything with the C stream interface; the stream that gave the schema is the first one that is read."""
    opened = [pa.RecordBatchReader.from_stream(source)]

    def batches(_: Sequence[str]) -> Iterator[pa.RecordBatch]:
        return iter(opened.pop() if opened else pa.RecordBatchReader.from_stream(source))

    return Stream(opened[0].schema, batches)


def _once(reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    """Read a stream that can be read once; an empty one may have been read before."""
    rows = 0
    for batch in reader:
        rows += batch.num_rows
        yield batch
    if not rows:
        raise SourceError("the RecordBatchReader has no rows, or was read before: create a new one for every call")


def _if_known(count: Callable[[], int]) -> int | None:
    """The number of rows; None if it cannot be read, in which case reading rows raises the error."""
    try:
        return count()
    except (pa.ArrowException, OSError):
        return None
