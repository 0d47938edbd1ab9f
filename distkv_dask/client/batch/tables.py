"""Tables as a source: Arrow batches, or Python records brought to Arrow types; a row's label is its number."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa

from distkv_dask.client.batch.rows import Content, Row, fingerprint
from distkv_dask.errors import InvalidRequestError, SourceError

CHUNK = 64
"""Rows that are in memory at once, beside those in flight."""

SAMPLE = 1000
"""Records from which the types of columns are inferred where nothing declares them."""


class Columns(NamedTuple):
    """Which columns are looked at: the text, those kept in the output (None: all others), those in the template."""

    text: str
    keep: Sequence[str] | None
    template: Sequence[str]

    def kept(self, schema: pa.Schema) -> pa.Schema:
        """Return the part of ``schema`` that goes to the output; raises SourceError for a column that is not there."""
        for name in dict.fromkeys((self.text, *(self.keep or ()))):
            if name not in schema.names:
                raise SourceError(f"the source has no column {name!r}. Its columns are: {', '.join(schema.names)}")
        names = [name for name in schema.names if name != self.text] if self.keep is None else self.keep
        return pa.schema([_decoded(schema.field(name)) for name in names])


class Chunk(NamedTuple):
    """Some rows: what is kept of them, and for each the fields of the template, or what is wrong with it."""

    kept: pa.RecordBatch
    values: Sequence[Mapping[str, Any] | str]


class TableSource:
    """A table read in chunks.

    Parameters
    ----------
    chunks
        Begins a pass over the table.
    columns
        Which columns are looked at.
    schema
        All columns.
    count
        Gives the number of rows, or None.
    """

    label = "row"

    def __init__(
        self,
        chunks: Callable[[], Iterable[Chunk]],
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
        for chunk in self._chunks():
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


def arrow_chunks(batches: Iterable[pa.RecordBatch], columns: Columns) -> Iterator[Chunk]:
    """Cut Arrow batches into chunks."""
    for batch in batches:
        for start in range(0, batch.num_rows, CHUNK):
            part = batch.slice(start, CHUNK)
            kept = columns.kept(part.schema)
            arrays = [part.column(field.name).cast(field.type) for field in kept]
            yield Chunk(
                pa.RecordBatch.from_struct_array(pa.StructArray.from_arrays(arrays, fields=list(kept)))
                if arrays
                else _nothing(part.num_rows),
                [_arrow_values(part, at, columns) for at in range(part.num_rows)],
            )


def record_chunks(records: Iterable[Mapping[str, Any] | str], columns: Columns, schema: pa.Schema) -> Iterator[Chunk]:
    """Cut Python records into chunks; a record that is a text says what is wrong with it."""
    kept, stream = columns.kept(schema), iter(records)
    while some := list(itertools.islice(stream, CHUNK)):
        values = [one if isinstance(one, str) else {name: one.get(name) for name in columns.template} for one in some]
        arrays = []
        for field in kept:
            array, wrong = _fitted([None if isinstance(one, str) else one.get(field.name) for one in some], field.type)
            arrays.append(array)
            for at in wrong:
                values[at] = f"column {field.name!r} should be {field.type}: {some[at][field.name]!r:.100}"
        yield Chunk(pa.RecordBatch.from_arrays(arrays, schema=kept) if arrays else _nothing(len(some)), values)


def inferred(records: Iterable[Mapping[str, Any] | str], text_column: str) -> pa.Schema:
    """Types of columns from the first :data:`SAMPLE` records; texts, nested and mixed values become text."""
    columns: dict[str, list[Any]] = {}
    for record in itertools.islice(records, SAMPLE):
        for name, value in () if isinstance(record, str) else record.items():
            columns.setdefault(name, []).append(value)
    return pa.schema([(name, pa.string() if name == text_column else _type(found)) for name, found in columns.items()])


def _content(values: Mapping[str, Any] | str, text_column: str) -> Content:
    if isinstance(values, str):
        raise InvalidRequestError(values)
    text = values.get(text_column)
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise InvalidRequestError(f"column {text_column!r} is not UTF-8 text: {error}") from error
    if _missing(text):
        raise InvalidRequestError(f"column {text_column!r} is empty (null)")
    if not isinstance(text, str):
        raise InvalidRequestError(f"column {text_column!r} should be text: {text!r:.100}")
    return Content({**values, text_column: text})


def _arrow_values(part: pa.RecordBatch, at: int, columns: Columns) -> Mapping[str, Any] | str:
    try:
        return {name: part.column(name)[at].as_py() for name in columns.template}
    except (UnicodeDecodeError, pa.ArrowException, ValueError) as error:
        return f"the row cannot be decoded: {error}"


def _decoded(field: pa.Field) -> pa.Field:
    """Dictionaries differ from batch to batch: their values are kept instead."""
    return field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field


def _missing(value: Any) -> bool:
    """None, or NaN, which is what pandas has for it."""
    return value is None or (isinstance(value, float) and value != value)


def _nothing(rows: int) -> pa.RecordBatch:
    return pa.RecordBatch.from_struct_array(pa.array([{}] * rows, pa.struct([])))


def _fitted(values: list[Any], kind: pa.DataType) -> tuple[pa.Array, list[int]]:
    """Return values as an array of a type, null in the places (returned too) of those that do not fit."""
    if pa.types.is_string(kind):
        values = [value if isinstance(value, str) or _missing(value) else _as_text(value) for value in values]
    try:
        return pa.array(values, kind, from_pandas=True), []
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        wrong = [at for at, value in enumerate(values) if not _fits(value, kind)]
        return pa.array(
            [None if at in wrong else value for at, value in enumerate(values)], kind, from_pandas=True
        ), wrong


def _fits(value: Any, kind: pa.DataType) -> bool:
    try:
        pa.array([value], kind, from_pandas=True)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return False
    return True


def _type(values: list[Any]) -> pa.DataType:
    try:
        kind = pa.array(values, from_pandas=True).type
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return pa.string()
    return pa.string() if pa.types.is_nested(kind) or pa.types.is_null(kind) else kind


def _as_text(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        return str(value)
