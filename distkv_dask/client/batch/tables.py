"""Tables as a source: Arrow batches, or Python records converted to Arrow types; a row's label is its number."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa

from distkv_dask.client.batch.column_types import (
    SAMPLE,
    ColumnType,
    decoded,
    exactly,
    fitted,
    parquet_refuses,
)
from distkv_dask.client.batch.rows import Content, Row, fingerprint
from distkv_dask.errors import InvalidRequestError, SourceError

CHUNK = 64
"""Rows that are in memory at once, in addition to those in flight."""

MOST_COLUMNS = 10_000
"""Maximum number of columns of records: keys that differ from record to record are not columns."""

_UNREADABLE = (UnicodeDecodeError, pa.ArrowException, ValueError, OverflowError)

Record = Mapping[str, Any] | str
"""A row by column, or a text with its error."""


class Columns(NamedTuple):
    """The columns that are used: the text, those kept in the output (None: all others), those in the template."""

    text: str
    keep: Sequence[str] | None
    template: Sequence[str]

    def kept(self, schema: pa.Schema) -> pa.Schema:
        """Return the part of ``schema`` that goes to the output.

        Raises
        ------
        SourceError
            When a column is missing, occurs twice, or has a type that Parquet does not have.
        """
        for name in dict.fromkeys((self.text, *(self.keep or ()))):
            if name not in schema.names:
                raise SourceError(f"the source has no column {name!r}. Its columns are: {', '.join(schema.names)}")
        names = [name for name in schema.names if name != self.text] if self.keep is None else self.keep
        counts = Counter(schema.names)
        for name in (*names, *self.template):
            if counts[name] > 1:
                raise SourceError(
                    f"the source has {counts[name]} columns called {name!r}: rename them, or leave them out by naming "
                    f"those to keep (keep=...)"
                )
        fields = [schema.field(name) for name in names]
        return pa.schema([_writable(field.with_type(decoded(field.type)).with_nullable(True)) for field in fields])


class Chunk(NamedTuple):
    """Some rows: the columns that are kept, and for each row the fields of the template, or its error."""

    kept: pa.RecordBatch
    values: Sequence[Record]


class TableSource:
    """A table read in chunks.

    Parameters
    ----------
    chunks
        Starts a pass over the table, given the columns that are kept.
    columns
        The columns that are used.
    schema
        All columns.
    count
        Gives the number of rows, or None.
    """

    label = "row"

    def __init__(
        self,
        chunks: Callable[[pa.Schema], Iterable[Chunk]],
        columns: Columns,
        schema: pa.Schema,
        count: Callable[[], int | None],
    ) -> None:
        self.fields = tuple(schema.names)
        self.kept = columns.kept(schema)
        self.count = count
        self._chunks = chunks
        self._text = columns.text

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Read chunk by chunk."""
        number = -1
        for chunk in self._chunks(self.kept):
            for at, values in enumerate(chunk.values):
                number += 1
                if number < start:
                    continue
                yield Row(
                    number,
                    fingerprint(values if isinstance(values, str) else repr(sorted(values.items()))),
                    chunk.kept.slice(at, 1),
                    partial(_content, values, self._text),
                )


def arrow_chunks(batches: Iterable[pa.RecordBatch], columns: Columns, kept: pa.Schema) -> Iterator[Chunk]:
    """Cut Arrow batches into chunks."""
    names = {*kept.names, *columns.template}
    for batch in batches:
        for start in range(0, batch.num_rows, CHUNK):
            part = batch.slice(start, CHUNK)
            wanted = {name: part.column(name) for name in names.intersection(part.schema.names)}
            yield chunk_of(wanted, part.num_rows, columns, kept)


def record_chunks(
    records: Iterable[Record], columns: Columns, kept: pa.Schema, names: Iterable[str]
) -> Iterator[Chunk]:
    """Cut Python records into chunks; ``names`` are the columns that are known."""
    stream, known = iter(records), frozenset(names)
    while some := list(itertools.islice(stream, CHUNK)):
        wanted = {
            name: [None if isinstance(one, str) else one.get(name) for one in some]
            for name in (*kept.names, *columns.template)
        }
        chunk = chunk_of(wanted, len(some), columns, kept)
        wrong = [_wrong(one, known if columns.keep is None else None) for one in some]
        yield chunk._replace(values=[one or other for one, other in zip(wrong, chunk.values, strict=True)])


def chunk_of(wanted: Mapping[str, pa.Array | list[Any]], rows: int, columns: Columns, kept: pa.Schema) -> Chunk:
    """Make a chunk from columns of Arrow or Python values; missing columns are null.

    A value that a kept column cannot store unchanged is an error of its row.
    """
    values = [_values(wanted, at, columns) for at in range(rows)]
    arrays = []
    for field in kept:
        found = wanted.get(field.name, pa.nulls(rows))
        array, wrong = fitted(found, field) if isinstance(found, list) else exactly(found, field.type)
        arrays.append(array)
        for at in wrong:
            values[at] = f"column {field.name!r} should be {field.type}: {_shown(found, at)}"
    return Chunk(_batch(arrays, kept, rows), values)


def errors_chunk(message: str, rows: int, kept: pa.Schema) -> Chunk:
    """Rows with an error and no values."""
    return Chunk(_batch([pa.nulls(rows, field.type) for field in kept], kept, rows), [message] * rows)


def inferred(records: Iterable[Record], text_column: str) -> tuple[pa.Schema, int]:
    """Find the types of the columns of records, and their number.

    Raises
    ------
    SourceError
        When there are more than :data:`MOST_COLUMNS` columns.
    """
    found: dict[str, ColumnType] = {}
    count = 0
    for record in records:
        count += 1
        for name, value in () if isinstance(record, str) else record.items():
            column = found.get(name)
            if column is None:
                column = found[name] = ColumnType()
                if len(found) > MOST_COLUMNS:
                    raise SourceError(
                        f"the records have more than {MOST_COLUMNS:,} different keys, too many for columns of a table: "
                        f"give each record the same keys, or put what differs into one of them"
                    )
            if name != text_column:
                column.add(value)
    return pa.schema([column.field(name) for name, column in found.items()]), count


def _content(values: Record, text_column: str) -> Content:
    if isinstance(values, str):
        raise InvalidRequestError(values)
    text = values.get(text_column)
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise InvalidRequestError(f"column {text_column!r} is not UTF-8 text: {error}") from error
    if text is None or (isinstance(text, float) and text != text):
        raise InvalidRequestError(f"column {text_column!r} is empty (null)")
    if not isinstance(text, str):
        raise InvalidRequestError(f"column {text_column!r} should be text: {text!r:.100}")
    return Content({**values, text_column: text})


def _values(wanted: Mapping[str, pa.Array | list[Any]], at: int, columns: Columns) -> Record:
    """The fields of the template in a row."""
    try:
        found = {name: wanted[name][at] if name in wanted else None for name in columns.template}
        return {name: one.as_py() if isinstance(one, pa.Scalar) else one for name, one in found.items()}
    except _UNREADABLE as error:
        return f"the row cannot be decoded: {error}"


def _shown(found: pa.Array | list[Any], at: int) -> str:
    try:
        return f"{found[at].as_py() if isinstance(found, pa.Array) else found[at]!r:.100}"
    except _UNREADABLE as error:
        return str(error)


def _wrong(record: Record, known: frozenset[str] | None) -> str | None:
    """The error of a record: its own, or an unknown column that is not null."""
    if isinstance(record, str) or known is None:
        return record if isinstance(record, str) else None
    new = next((name for name in record.keys() - known if record[name] is not None), None)
    return (
        None
        if new is None
        else (
            f"column {new!r} is not among those of the first {SAMPLE:,} records, which make the output's columns: name "
            f"those to keep (keep=...)"
        )
    )


def _batch(arrays: list[pa.Array], kept: pa.Schema, rows: int) -> pa.RecordBatch:
    if not arrays:
        return pa.RecordBatch.from_struct_array(pa.array([{}] * rows, pa.struct([])))
    return pa.RecordBatch.from_arrays(arrays, schema=kept)


def _writable(field: pa.Field) -> pa.Field:
    if (error := parquet_refuses(field)) is not None:
        raise SourceError(
            f"column {field.name!r} of type {field.type} cannot go to the output ({error}): leave it out by naming "
            f"those to keep (keep=...)"
        )
    return field
