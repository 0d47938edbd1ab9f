"""One run of a batch: what the source has and the output lacks is answered, and put into the output as it finishes."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from distkv_dask.client.batch.columns import schema_fields, schema_values
from distkv_dask.client.batch.openai_format import OpenAIBatchSource, write_openai_answers
from distkv_dask.client.batch.output import RESULT, Output, result_batch
from distkv_dask.client.batch.process import BatchSummary
from distkv_dask.client.batch.progress import progress_bar
from distkv_dask.client.batch.rows import Row, Source
from distkv_dask.client.batch.runner import Outcome, Runner
from distkv_dask.client.batch.sources import open_source
from distkv_dask.client.batch.spec import BatchSpec
from distkv_dask.client.batch.tables import Columns
from distkv_dask.errors import InvalidRequestError, OutputError, SourceError, TooManyErrorsError

if TYPE_CHECKING:
    from distkv_dask.client.engine import Engine


class Job:
    """One run; :func:`distkv_dask.client.batch.process.process` says what the parameters are."""

    def __init__(
        self,
        engine: Engine,
        source: Any,
        spec: BatchSpec,
        keep: Sequence[str] | None,
        max_errors: int | None,
        in_flight: int | None,
    ) -> None:
        self._engine = engine
        self._source = source
        self._spec = spec
        self._keep = keep
        self._max_errors = max_errors
        self._in_flight = in_flight or 2 * engine.config.window_batch * engine.facts["workers"]
        self._errors = 0
        text = spec.sampling.schema
        self._answers: Mapping[str, Any] = {} if text is None else json.loads(str(text))

    def write(self, out: Path, retry_errors: bool, progress: bool | None) -> BatchSummary:
        """Answer everything that is not in the output yet."""
        began = time.monotonic()
        source = self._open()
        lines = out.suffix == ".jsonl"
        if lines and not isinstance(source, OpenAIBatchSource):
            raise OutputError(f"{out}: only answers to an OpenAI batch file are written as JSONL; name a folder")
        schema = self._columns(source)
        folder = out.with_name(out.name + ".parquet") if lines else out
        model = self._engine.model
        about = {"model": model.name, "rope_scaling": model.rope_scaling, "dtype": self._engine.dtype}
        parameters = {**about, **self._spec.parameters()}
        with (
            Output(folder, schema, parameters, retry_errors) as output,
            self._engine.in_span("distkv", f"batch {folder.name}"),
        ):
            earlier, self._errors = len(output.done), output.errors
            rows = earlier
            total = source.count()
            total = None if total is None else total * len(self._spec.questions)
            with progress_bar(total, earlier, self._errors, progress) as advance:
                self._check_errors(f"in {folder} already")
                for outcomes in self._run(source, output):
                    advance(len(outcomes), sum(one.error is not None for one in outcomes))
                    rows += len(outcomes)
            output.rotate(now=True)
            if lines:
                _write_lines(folder, out, self._engine.model.name)
        return BatchSummary(out, rows, earlier, self._errors, time.monotonic() - began)

    def answers(self) -> Iterator[dict[str, Any]]:
        """Answer everything, row by row."""
        if self._engine.client.asynchronous:
            raise InvalidRequestError("out=None needs a synchronous Dask client: give out=, or use submit")
        source = self._open()
        schema = self._columns(source)
        return (row for outcomes in self._run(source, None) if outcomes for row in _batch(schema, outcomes).to_pylist())

    def _open(self) -> Source:

        spec = self._spec
        source = open_source(self._source, Columns(spec.text_column, self._keep, spec.columns), self._engine.client)
        if isinstance(source, OpenAIBatchSource):
            if spec.questions != (None,) or spec.template is not None:
                raise InvalidRequestError("an OpenAI batch file has its own prompts: leave out question and template")
            return source
        for name in spec.columns:
            if name not in source.fields:
                raise InvalidRequestError(
                    f"the template uses {{{name}}}, but the source has only: {', '.join(source.fields)}"
                )
        return source

    def _run(self, source: Source, output: Output | None) -> Generator[list[Outcome]]:
        """Answer what is not done, and put it into the output as it finishes."""
        schema = self._columns(source)
        runner = Runner(self._engine, self._spec, self._in_flight).run(self._todo(source, output))
        with contextlib.closing(runner):
            for ended in runner:
                outcomes = [self._read(one) for one in ended] if self._answers else ended
                if output is not None:
                    if outcomes:
                        output.append(_batch(schema, outcomes))
                    else:
                        output.rotate()
                yield outcomes
                self._errors += sum(one.error is not None for one in outcomes)
                self._check_errors(next((one.error for one in outcomes if one.error is not None), ""))

    def _read(self, outcome: Outcome) -> Outcome:
        """Read an answer that follows a JSON schema into the columns of its properties."""
        if outcome.answer is None:
            return outcome
        try:
            return replace(outcome, values=schema_values(self._answers, outcome.answer.text))
        except InvalidRequestError as error:
            return replace(outcome, error=str(error))

    def _columns(self, source: Source) -> pa.Schema:
        """Return the schema of the output."""
        added = schema_fields(self._answers)
        known = [source.label, *RESULT.names]
        for what, names, hint in (
            ("source's column", source.kept.names, "leave it out by naming those to keep (keep=...)"),
            ("answers' property", [field.name for field in added], "rename it in the JSON schema"),
        ):
            if taken := [name for name in names if name in known]:
                raise SourceError(f"the {what} {taken[0]!r} has the name of another column of the output: {hint}")
            known += names
        label = pa.field(source.label, pa.int64() if source.label == "row" else pa.string())
        return pa.schema([label, *source.kept, *RESULT, *added])

    def _todo(self, source: Source, output: Output | None) -> Iterator[tuple[Row, str | None]]:
        done = {} if output is None else output.done
        for row in source.rows():
            for question in self._spec.questions:
                found = done.get((row.label, question))
                if found is None:
                    yield row, question
                elif found != row.fingerprint:
                    raise SourceError(
                        f"{source.label} {row.label} of the source has changed since it was answered: choose another "
                        f"output, or bring back what it was"
                    )

    def _check_errors(self, last: str) -> None:
        if self._max_errors is not None and self._errors > self._max_errors:
            raise TooManyErrorsError(
                f"{self._errors} rows have errors, more than max_errors={self._max_errors}; one of them: {last}"
            )


def _batch(schema: pa.Schema, outcomes: list[Outcome]) -> pa.RecordBatch:
    """Finished rows as rows of the output."""
    return result_batch(schema, [(one.row, _result(one)) for one in outcomes])


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


def _write_lines(folder: Path, out: Path, model: str) -> None:
    """Write a finished output as an OpenAI output file."""
    unfinished = out.with_name(f".{out.name}.unfinished")
    with unfinished.open("wb") as file:
        write_openai_answers(pq.read_table(folder), model, file)
    unfinished.replace(out)
