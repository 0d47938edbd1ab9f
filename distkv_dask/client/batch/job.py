"""One run of a batch: what the source has and the output lacks is answered, into a folder or into a table in memory."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping
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
from distkv_dask.client.batch.spec import BatchSpec
from distkv_dask.errors import InvalidRequestError, OutputError, SourceError, TooManyErrorsError

if TYPE_CHECKING:
    from distkv_dask.client.engine import Engine


class Job:
    """One run; :func:`distkv_dask.client.batch.process.process` says what the parameters are."""

    def __init__(
        self,
        engine: Engine,
        source: Source,
        spec: BatchSpec,
        max_errors: int | None = None,
        in_flight: int | None = None,
    ) -> None:
        self._engine = engine
        self._source = source
        self._spec = spec
        self._max_errors = max_errors
        self._in_flight = in_flight or 2 * engine.config.window_batch * engine.facts["workers"]
        self._errors = 0
        self._answers = answer_schema(spec)
        self.schema = output_schema(source, self._answers)
        """Columns of the output."""

    def write(self, out: Path, retry_errors: bool, progress: bool | None) -> BatchSummary:
        """Answer everything that is not in the output yet."""
        began = time.monotonic()
        source = self._source
        lines = out.suffix == ".jsonl"
        if lines and not isinstance(source, OpenAIBatchSource):
            raise OutputError(f"{out}: only answers to an OpenAI batch file are written as JSONL; name a folder")
        folder = out.with_name(out.name + ".parquet") if lines else out
        model = self._engine.model
        about = {"model": model.name, "rope_scaling": model.rope_scaling, "dtype": self._engine.dtype}
        parameters = {**about, **self._spec.parameters()}
        with (
            Output(folder, self.schema, parameters, retry_errors) as output,
            self._engine.in_span("distkv", f"batch {folder.name}"),
        ):
            earlier, self._errors = len(output.done), output.errors
            rows = earlier
            total = source.count()
            total = None if total is None else total * len(self._spec.questions)
            with progress_bar(total, earlier, self._errors, progress) as advance:
                self._check_errors(f"in {folder} already")
                for outcomes in self._run(self._todo(output.done)):
                    if outcomes:
                        output.append(self._batch(outcomes))
                    else:
                        output.rotate()
                    advance(len(outcomes), sum(one.error is not None for one in outcomes))
                    rows += len(outcomes)
            output.rotate(now=True)
            if lines:
                _write_lines(folder, out, self._engine.model.name)
        return BatchSummary(out, rows, earlier, self._errors, time.monotonic() - began)

    def table(self, start: int = 0, stop: int | None = None, on_tick: Callable[[], None] | None = None) -> pa.Table:
        """Answer rows ``start`` to ``stop`` of the source, and return them in its order.

        ``on_tick`` is called every second or so; what it raises ends the run.
        """
        rows = None if stop is None else (stop - start) * len(self._spec.questions)
        todo = list(itertools.islice(self._todo({}, start), rows))
        found: dict[tuple[int | str, str | None], pa.RecordBatch] = {}
        with contextlib.closing(self._run(iter(todo))) as run:
            for outcomes in run:
                found.update({(one.row.label, one.question): self._batch([one]) for one in outcomes})
                if on_tick is not None:
                    on_tick()
        return pa.Table.from_batches([found[row.label, question] for row, question in todo], self.schema)

    def _run(self, todo: Iterator[tuple[Row, str | None]]) -> Generator[list[Outcome]]:
        """Answer rows; yields them as they finish, and nothing now and then."""
        with contextlib.closing(Runner(self._engine, self._spec, self._in_flight).run(todo)) as runner:
            for ended in runner:
                outcomes = [self._read(one) for one in ended] if self._answers else ended
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

    def _todo(
        self, done: Mapping[tuple[int | str, str | None], str], start: int = 0
    ) -> Iterator[tuple[Row, str | None]]:
        source = self._source
        for row in source.rows(start):
            for question in self._spec.questions:
                found = done.get((row.label, question))
                if found is None:
                    yield row, question
                elif found != row.fingerprint:
                    raise SourceError(
                        f"{source.label} {row.label} of the source has changed since it was answered: choose another "
                        f"output, or bring back what it was"
                    )

    def _batch(self, outcomes: list[Outcome]) -> pa.RecordBatch:
        """Finished rows as rows of the output."""
        return result_batch(self.schema, [(one.row, _result(one)) for one in outcomes])

    def _check_errors(self, last: str) -> None:
        if self._max_errors is not None and self._errors > self._max_errors:
            raise TooManyErrorsError(
                f"{self._errors} rows have errors, more than max_errors={self._max_errors}; one of them: {last}"
            )


def answer_schema(spec: BatchSpec) -> Mapping[str, Any]:
    """The JSON schema that answers follow; empty if there is none."""
    text = spec.sampling.schema
    return {} if text is None else json.loads(str(text))


def output_schema(source: Source, answers: Mapping[str, Any]) -> pa.Schema:
    """Columns of the output: the label, what is kept of the source, :data:`RESULT`, and the answers' properties.

    Raises
    ------
    SourceError
        When two of them have the same name.
    """
    added = schema_fields(answers)
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
