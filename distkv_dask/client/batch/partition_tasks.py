"""Tasks of a lazy batch: each answers one partition with the engine that it attaches to, and returns a pandas frame."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pyarrow as pa
from distributed import Client

from distkv_dask.client.batch.frames import as_records
from distkv_dask.client.batch.job import Job
from distkv_dask.client.batch.rows import Source
from distkv_dask.client.batch.sources import columns_of, records_source, source_for
from distkv_dask.client.batch.spec import BatchSpec
from distkv_dask.client.batch.turns import turn
from distkv_dask.client.session.attached_engine import AttachedEngine
from distkv_dask.client.session.session import Session

AT_ONCE = 2
"""Partitions that a worker answers at the same time: another one is ready while one waits for its longest answers."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The batch's questions, and the engine's id."""

    engine: str
    spec: BatchSpec
    max_errors: int | None
    in_flight: int


def answer_frame(part: pd.DataFrame, kept: Sequence[Any], asked: Asked) -> pd.DataFrame:
    """Answer the rows of a pandas frame; ``kept`` columns and the index are repeated for each question."""
    table = _answer(lambda client: source_for(part, asked.spec, (), client), asked)
    left = part[list(kept)].iloc[table.column("row").to_pylist()]
    right = as_pandas(table, label=False)
    right.index = left.index
    return pd.concat([left, right], axis=1)


def answer_rows(rows: tuple[int, int], path: str, keep: Sequence[str] | None, asked: Asked) -> pd.DataFrame:
    """Answer some rows of a file or folder that workers can read."""
    return as_pandas(_answer(lambda client: source_for(path, asked.spec, keep, client), asked, *rows), label=True)


def answer_records(part: Iterable[Any], keep: Sequence[str] | None, schema: pa.Schema, asked: Asked) -> pd.DataFrame:
    """Answer a partition of a Bag of texts or records."""
    records = list(as_records(part, asked.spec.text_column))
    source = records_source(lambda: records, columns_of(asked.spec, keep), schema, lambda: len(records))
    return as_pandas(_answer(lambda _: source, asked), label=False)


def as_pandas(table: pa.Table, label: bool) -> pd.DataFrame:
    """A table of answers with pandas' nullable types, or Arrow's if there is none; ``label`` keeps rows' labels."""
    dropped = ["fingerprint"] if label else [table.schema.names[0], "fingerprint"]
    return table.drop_columns(dropped).to_pandas(types_mapper=_dtype)


def _dtype(kind: pa.DataType) -> Any:
    if pa.types.is_string(kind):
        return pd.StringDtype("pyarrow")
    if pa.types.is_int64(kind):
        return pd.Int64Dtype()
    if pa.types.is_float64(kind):
        return pd.Float64Dtype()
    return pd.BooleanDtype() if pa.types.is_boolean(kind) else pd.ArrowDtype(kind)


def _answer(open_source: Callable[[Client], Source], asked: Asked, start: int = 0, stop: int | None = None) -> pa.Table:
    with turn("answers", AT_ONCE) as on_tick, closing(Session(None, AttachedEngine(asked.engine))) as session:
        job = Job(session, open_source(session.client), asked.spec, asked.max_errors, asked.in_flight)
        return job.table(start, stop, on_tick)
