"""Rows of the output: a row's result is written into the output's columns, or is an error of that row alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from distkv_dask.client.batch.columns import answer_fields, answer_values
from distkv_dask.client.batch.details import RESPONSE
from distkv_dask.client.batch.openai_format import OpenAIBatchSource
from distkv_dask.client.batch.output import RESULT
from distkv_dask.client.batch.rows import Source
from distkv_dask.client.batch.runner import Outcome
from distkv_dask.client.batch.spec import BatchSpec
from distkv_dask.errors import SourceError, in_words
from distkv_dask.models.source import ModelSource


class Lot(NamedTuple):
    """Finished rows: their results, and their rows of the output."""

    outcomes: Sequence[Outcome]
    batch: pa.RecordBatch

    @property
    def errors(self) -> list[str]:
        """Errors of rows."""
        return [one.error for one in self.outcomes if one.error is not None]


class Results:
    """Makes rows of the output.

    Parameters
    ----------
    source, spec
        The batch's.
    model
        What answers, whose hidden states have the size of embeddings; None where it is not known yet.

    Raises
    ------
    SourceError
        When two columns of the output have the same name.
    """

    def __init__(self, source: Source, spec: BatchSpec, model: ModelSource | None) -> None:
        self._kept = source.kept
        self._sampling = spec.sampling
        more = [RESPONSE] if isinstance(source, OpenAIBatchSource) else []
        size = -1 if spec.sampling.embed is None or model is None else model.hidden_size()
        self.schema = _columns(source, [*answer_fields(spec.sampling, size), *more])
        """Columns of the output: the label, what is kept of the source, :data:`RESULT`, and what answers hold."""

    def lot(self, outcomes: Sequence[Outcome]) -> Lot:
        """Rows of the output; one that cannot be written has an error and does not affect others."""
        read = [self._read(one) for one in outcomes]
        try:
            return Lot(read, self._written(read))
        except Exception:
            alone = [self._alone(one) for one in read]
            return Lot([one.outcomes[0] for one in alone], pa.concat_batches([one.batch for one in alone]))

    def _read(self, outcome: Outcome) -> Outcome:
        """Read what an answer holds into its columns."""
        if outcome.answer is None:
            return outcome
        try:
            return replace(outcome, values=answer_values(self._sampling, outcome.answer))
        except Exception as error:
            return replace(outcome, error=in_words(error))

    def _alone(self, outcome: Outcome) -> Lot:
        """One row; if needed, without the answer's properties, or without the source's columns."""
        try:
            return Lot([outcome], self._written([outcome]))
        except Exception as error:
            outcome = replace(outcome, error=f"the row cannot be written to the output: {in_words(error)}", values={})
        try:
            return Lot([outcome], self._written([outcome]))
        except Exception:
            nothing = pa.RecordBatch.from_pylist([{}], self._kept)
            outcome = replace(outcome, row=replace(outcome.row, kept=nothing))
        return Lot([outcome], self._written([outcome]))

    def _written(self, outcomes: Sequence[Outcome]) -> pa.RecordBatch:
        schema, columns = self.schema, len(self._kept)
        kept = [pa.concat_arrays([one.row.kept.column(at) for one in outcomes]) for at in range(columns)]
        labels = pa.array([one.row.label for one in outcomes], schema[0].type)
        results = [_result(one) for one in outcomes]
        added = [schema.field(at) for at in range(1 + columns, len(schema))]
        filled = [pa.array([one.get(field.name) for one in results], field.type) for field in added]
        batch = pa.RecordBatch.from_arrays([labels, *kept, *filled], schema=schema)
        # Values that Parquet cannot store (seconds beyond the range of milliseconds) should fail now.
        pq.write_table(pa.Table.from_batches([batch]), pa.MockOutputStream())
        return batch


def _columns(source: Source, properties: Sequence[pa.Field]) -> pa.Schema:
    known = [source.label, *RESULT.names]
    for what, names, hint in (
        ("source's column", source.kept.names, "leave it out by naming those to keep (keep=...)"),
        ("answers' property", [field.name for field in properties], "rename it in the JSON schema, or in the source"),
    ):
        if taken := [name for name in names if name in known]:
            raise SourceError(f"the {what} {taken[0]!r} has the name of another column of the output: {hint}")
        known += names
    label = pa.field(source.label, pa.int64() if source.label == "row" else pa.string())
    schema = pa.schema([label, *source.kept, *RESULT, *properties])
    for field in schema:
        try:
            pq.write_table(pa.schema([field]).empty_table(), pa.MockOutputStream())
        except pa.ArrowException as error:
            hint = "leave it out by naming those to keep (keep=...)"
            raise SourceError(f"column {field.name!r} cannot be written to a Parquet file: {error}; {hint}") from error
    return schema


def _result(outcome: Outcome) -> dict[str, Any]:
    answer = outcome.answer
    return {
        "question": outcome.question,
        "answer": answer.text if answer else None,
        "finish_reason": answer.finish_reason if answer else "error",
        "error": outcome.error,
        "prompt_tokens": answer.prompt_tokens if answer else None,
        "new_tokens": answer.new_tokens if answer else None,
        "reused_tokens": answer.reused_tokens if answer else None,
        "parts": answer.parts if answer else None,
        "dropped_tokens": answer.dropped_tokens if answer else None,
        "seconds": outcome.seconds,
        "fingerprint": outcome.row.fingerprint,
        **outcome.values,
    }
