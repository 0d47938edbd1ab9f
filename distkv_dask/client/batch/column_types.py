"""Types of columns that store every value unchanged; values that do not fit are errors of their rows."""

from __future__ import annotations

import datetime
import decimal
import io
import json
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

SAMPLE = 1000
"""Values after which a column keeps its kind (numbers, texts, ...): a later value of another kind is an error."""

_JSON = {b"distkv": b"json"}
_REFUSED = (pa.ArrowException, TypeError, ValueError, OverflowError, RecursionError)
_PLAIN: Mapping[type, pa.DataType] = {bool: pa.bool_(), float: pa.float64(), str: pa.string()}


class ColumnType:
    """The type of a column, inferred from its values one after the other.

    Number types are widened as needed. If the first :data:`SAMPLE` values are nested, or of kinds without a common
    type, the column has JSON texts.
    """

    def __init__(self) -> None:
        self._type: pa.DataType | None = pa.null()
        self._seen = 0
        self._negative = False

    def add(self, value: Any) -> None:
        """Take the next value into account."""
        if value is None or self._type is None:
            return
        self._seen += 1
        self._negative = self._negative or (type(value) is int and value < 0)
        kind = value_type(value)
        if kind is self._type:
            return
        wider = None if kind is None else widened(self._type, kind)
        if wider is not None or self._seen <= SAMPLE:
            self._type = wider

    def field(self, name: str) -> pa.Field:
        """The column; without values, a column of texts."""
        if self._type is None:
            return json_field(name)
        if self._type == _DECIMAL_64 and not self._negative:
            return pa.field(name, pa.uint64())
        return pa.field(name, pa.string() if pa.types.is_null(self._type) else self._type)


def value_type(value: Any) -> pa.DataType | None:
    """Arrow's type that stores a value unchanged; None if only JSON text can."""
    if (plain := _PLAIN.get(type(value))) is not None:
        return plain
    if isinstance(value, int):
        if -(2**63) <= value < 2**63:
            return _INT64
        return pa.uint64() if 0 <= value < 2**64 else _DECIMAL if abs(value) < 10**38 else None
    if isinstance(value, dict | list | tuple):
        return None
    try:
        kind = pa.scalar(value).type
    except _REFUSED:
        return None
    return None if pa.types.is_nested(kind) else kind


def json_field(name: str) -> pa.Field:
    """A column of texts, in which other values are written as JSON."""
    return pa.field(name, pa.string(), metadata=_JSON)


def is_json(field: pa.Field) -> bool:
    """Whether :func:`json_field` made a column."""
    return bool(field.metadata == _JSON)


def widened(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The type that stores the values of both types, numbers as equal numbers; None if there is none.

    Integers beyond 2 ** 53 may have no equal double: :func:`exactly` refuses them one by one.

    Examples
    --------
    >>> widened(pa.int64(), pa.float32()), widened(pa.null(), pa.string()), widened(pa.string(), pa.int64())
    (DataType(double), DataType(string), None)
    """
    one, other = decoded(one), decoded(other)
    is_ = pa.types
    if one == other or is_.is_null(other):
        return one
    if is_.is_null(one):
        return other
    if (is_.is_floating(one) and is_.is_integer(other)) or (is_.is_integer(one) and is_.is_floating(other)):
        return pa.float64()
    if is_.is_integer(one) and is_.is_integer(other) and pa.uint64() in (one, other):
        return pa.uint64() if is_.is_unsigned_integer(one) and is_.is_unsigned_integer(other) else _DECIMAL_64
    if is_.is_timestamp(one) and is_.is_timestamp(other):
        finer = max(one.unit, other.unit, key=("s", "ms", "us", "ns").index)
        return pa.timestamp(finer, one.tz) if bool(one.tz) == bool(other.tz) else None
    if is_.is_struct(one) and is_.is_struct(other):
        return _widened_struct(one, other)
    if is_.is_list(one) and is_.is_list(other):
        value = widened(one.value_type, other.value_type)
        return None if value is None else pa.list_(value)
    return _unified(one, other) if any(alike(one) and alike(other) for alike in _ALIKE) else None


def decoded(kind: pa.DataType) -> pa.DataType:
    """The plain type of the same values: dictionaries differ by batch, and Parquet cannot store runs."""
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return decoded(kind.value_type)
    return {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}.get(kind, kind)


def parquet_refuses(field: pa.Field) -> Exception | None:
    """Why a column cannot be written to Parquet, None if it can."""
    try:
        pq.ParquetWriter(io.BytesIO(), pa.schema([field])).close()
    except (pa.ArrowException, UnicodeEncodeError) as error:
        return error
    return None


def exactly(array: pa.Array, kind: pa.DataType) -> tuple[pa.Array, list[int]]:
    """Cast an array, with nulls for values that this would change; returns their positions, too."""
    if pa.types.is_run_end_encoded(array.type):
        array = pc.run_end_decode(array)
    fits = widened(kind, array.type) == kind or _checked(array.type, kind)
    if fits or array.null_count == len(array):
        try:
            return _cast(array, kind), []
        except _REFUSED:
            pass
    wrong, parts = [], []
    for at in range(len(array)):
        try:
            if not fits and array[at].is_valid:
                raise ValueError
            parts.append(_cast(array.slice(at, 1), kind))
        except _REFUSED:
            wrong.append(at)
            parts.append(pa.nulls(1, kind))
    return pa.concat_arrays(parts) if parts else pa.nulls(0, kind), wrong


def fitted(values: list[Any], field: pa.Field) -> tuple[pa.Array, list[int]]:
    """Return values as the array of a column, with nulls for those that do not fit; returns their positions, too."""
    wrong: list[int] = []
    if is_json(field):
        values = [_text(value, at, wrong) for at, value in enumerate(values)]
    try:
        array = pa.array(values, field.type)
    except _REFUSED:
        wrong += [at for at, value in enumerate(values) if not _holds(field.type, value)]
    else:
        wrong += [at for at, pair in enumerate(zip(values, array.to_pylist(), strict=True)) if not _same(*pair)]
        if not wrong:
            return array, []
    left_out = frozenset(wrong)
    kept = [None if at in left_out else value for at, value in enumerate(values)]
    return pa.array(kept, field.type), sorted(left_out)


def _checked(one: pa.DataType, other: pa.DataType) -> bool:
    """Whether a cast to a narrower type fails if it would change a value."""
    if pa.types.is_integer(other):
        return bool(pa.types.is_integer(one) or pa.types.is_floating(one))
    return _is_text(decoded(one)) and _is_text(other)


def _cast(array: pa.Array, kind: pa.DataType) -> pa.Array:
    cast = array if array.type == kind else array.cast(kind)
    cast.validate(full=True)  # some writers' texts are not UTF-8
    return cast


def _holds(kind: pa.DataType, value: Any) -> bool:
    try:
        return _same(value, pa.array([value], kind)[0].as_py())
    except _REFUSED:
        return False


def _same(value: Any, read: Any) -> bool:
    """Whether what is read back is what was written; True is not 1 here, and NaN is NaN."""
    if value is read:
        return True
    try:
        equal = bool(value == read) or bool(value != value and read != read)
    except _REFUSED:
        return False
    return equal and isinstance(value, bool) == isinstance(read, bool)


def _text(value: Any, at: int, wrong: list[int]) -> str | None:
    if value is None or isinstance(value, str):
        return value
    try:
        plain = value if isinstance(value, dict | list | tuple | int | float) else _json(value)
        return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False, default=_json)
    except _REFUSED:
        wrong.append(at)
        return None


def _json(value: Any) -> Any:
    """The JSON form of a value that JSON does not have."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | uuid.UUID):
        return str(value)
    if callable(tolist := getattr(value, "tolist", None)):  # NumPy's arrays and scalars
        return tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _widened_struct(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    kinds: dict[str, pa.DataType | None] = {field.name: field.type for field in one}
    for field in other:
        kind = kinds.get(field.name, pa.null())
        kinds[field.name] = None if kind is None else widened(kind, field.type)
    return None if None in kinds.values() else pa.struct(list(kinds.items()))


def _unified(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    schemas: Iterable[pa.Schema] = (pa.schema([("", kind)]) for kind in (one, other))
    try:
        return pa.unify_schemas(list(schemas), promote_options="permissive").field(0).type
    except pa.ArrowException:
        return None


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _is_exact(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_decimal(kind))


_INT64 = pa.int64()
_DECIMAL = pa.decimal128(38, 0)
_DECIMAL_64 = pa.decimal128(20, 0)  # holds int64 and uint64
_ALIKE = (
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_date,
    pa.types.is_time,
    pa.types.is_duration,
    _is_text,
    _is_binary,
    _is_exact,
)
