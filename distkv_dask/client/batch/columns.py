"""Columns of the output for answers that follow a JSON schema: one of Arrow's types for each property."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from distkv_dask.errors import InvalidRequestError

_PLAIN = {"string": pa.string(), "integer": pa.int64(), "number": pa.float64(), "boolean": pa.bool_()}


def schema_fields(schema: Mapping[str, Any]) -> list[pa.Field]:
    """Return a column for each property of an object's schema; none for other schemas.

    What Arrow has no type for (unions, references, maps, objects that may have more properties) is a column of JSON
    texts.

    Examples
    --------
    >>> schema = {"type": "object", "properties": {"year": {"type": "integer"}, "who": {"type": ["string", "null"]}}}
    >>> [(field.name, str(field.type)) for field in schema_fields(schema)]
    [('year', 'int64'), ('who', 'string')]
    """
    return [pa.field(name, _type(one) or pa.string()) for name, one in schema.get("properties", {}).items()]


def schema_values(schema: Mapping[str, Any], text: str) -> dict[str, Any]:
    """Read an answer: the value of each property, None for those that it leaves out.

    Raises
    ------
    InvalidRequestError
        When the answer is no JSON (it was cut) or no object, or a value is larger than its column's type can hold.
    """
    try:
        answer = json.loads(text)
    except ValueError as error:
        raise InvalidRequestError(
            f"the answer is not complete JSON ({error}): raise max_new_tokens, or bound texts and lists in the schema "
            f"(maxLength, maxItems)"
        ) from error
    if not isinstance(answer, dict) and schema.get("properties"):
        raise InvalidRequestError(
            f"the answer is not an object ({type(answer).__name__}), and has none of the schema's properties: add "
            f'"type": "object" to the schema'
        )
    values = {}
    for name, one in schema.get("properties", {}).items():
        value = answer.get(name)
        kind = _type(one)
        values[name] = value if kind is not None or value is None else json.dumps(value)
        try:
            pa.array([values[name]], kind or pa.string())
        except (pa.ArrowException, OverflowError) as error:
            raise InvalidRequestError(f"the answer's {name} does not fit its column: {error}") from error
    return values


def _type(schema: Any) -> pa.DataType | None:
    """Return Arrow's type for a schema, None where there is none."""
    if not isinstance(schema, Mapping):
        return None
    kind = schema.get("type")
    if isinstance(kind, list) and len(kind) == 2 and "null" in kind:
        (kind,) = (one for one in kind if one != "null")
    if kind is None and (choices := schema.get("enum")) and all(isinstance(one, str) for one in choices):
        kind = "string"
    if kind == "array" and (items := _type(schema.get("items"))) is not None:
        return pa.list_(items)
    if kind == "object" and schema.get("additionalProperties") is False:
        inner = {name: _type(one) for name, one in schema.get("properties", {}).items()}
        return pa.struct(list(inner.items())) if inner and all(inner.values()) else None
    return _PLAIN.get(str(kind))
