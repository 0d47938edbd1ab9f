"""Columns of the output for what answers hold: properties of a JSON schema, each of an Arrow type, and quotes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from distkv_dask.client.batch.answer_plan import Answer
from distkv_dask.client.batch.details import detail_fields
from distkv_dask.errors import InvalidRequestError
from distkv_dask.quotes import free_answer
from distkv_dask.sampling import SamplingParams

QUOTE = (
    pa.field("quote", pa.string()), pa.field("start", pa.int64()), pa.field("stop", pa.int64()),
    pa.field("page", pa.int32()),
)  # fmt: skip
"""Columns of a quote: see :class:`~distkv_dask.Quote`."""

_PLAIN = {"string": pa.string(), "integer": pa.int64(), "number": pa.float64(), "boolean": pa.bool_()}


def answer_fields(sampling: SamplingParams, size: int) -> list[pa.Field]:
    """Return the columns of the output that hold what answers say; embeddings have ``size`` numbers."""
    more = detail_fields(sampling, size)
    if sampling.quotes is not None:
        return [*QUOTE, *more]
    return more if sampling.schema is None else [*schema_fields(json.loads(str(sampling.schema))), *more]


def answer_values(sampling: SamplingParams, answer: Answer) -> dict[str, Any]:
    """Read those columns' values from an answer; the rest of its text is among them, as ``"answer"``.

    Raises
    ------
    InvalidRequestError
        When it was cut before them, or they cannot be read.
    """
    if sampling.quotes is not None:
        if (quote := answer.quote) is None:
            raise InvalidRequestError("the answer was cut before its quote: raise max_new_tokens")
        found = {"quote": quote.text, "start": quote.start, "stop": quote.stop, "page": quote.page}
        found |= {"answer": free_answer(answer.text)} if sampling.quotes == "evidence" else {}
        return {**found, **answer.details}
    if sampling.schema is None:
        return dict(answer.details)
    return {**schema_values(json.loads(str(sampling.schema)), answer.text), **answer.details}


def schema_fields(schema: Mapping[str, Any]) -> list[pa.Field]:
    """Return a column for each property of an object's schema, and none for other schemas.

    Properties without an Arrow type (unions, references, maps, objects that may have more properties) become JSON
    texts.

    Examples
    --------
    >>> schema = {"type": "object", "properties": {"year": {"type": "integer"}, "who": {"type": ["string", "null"]}}}
    >>> [(field.name, str(field.type)) for field in schema_fields(schema)]
    [('year', 'int64'), ('who', 'string')]
    """
    return [pa.field(name, _type(one) or pa.string()) for name, one in schema.get("properties", {}).items()]


def schema_values(schema: Mapping[str, Any], text: str) -> dict[str, Any]:
    """Read an answer: the value of each property, None for missing ones.

    Raises
    ------
    InvalidRequestError
        When the answer is not JSON (it was cut) or not an object, or a value does not fit its column's type.
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
    """Return Arrow's type for a schema, None if there is none."""
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
