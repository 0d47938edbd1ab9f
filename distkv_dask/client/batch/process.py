"""``engine.process``: a table or folder of documents goes in, a table of answers comes out."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distkv_dask.client.batch.spec import COMBINE, BatchSpec, TooLong
from distkv_dask.errors import InvalidRequestError, OutputError, SourceError, TooManyErrorsError
from distkv_dask.types import SamplingParams

if TYPE_CHECKING:
    import pyarrow as pa

    from distkv_dask.client.batch.output import Output
    from distkv_dask.client.batch.rows import Row, Source
    from distkv_dask.client.batch.runner import Outcome
    from distkv_dask.client.engine import Engine


@dataclass(frozen=True, slots=True)
class BatchSummary:
    """What a batch did: rows of the output, how many were there before, how many have errors, and seconds it took."""

    out: Path
    rows: int
    earlier: int
    errors: int
    seconds: float


def process(
    engine: Engine,
    source: Any,
    *,
    question: str | None = None,
    questions: Sequence[str] | None = None,
    template: str | None = None,
    out: str | PathLike[str] | None,
    text_column: str = "text",
    keep: Sequence[str] | None = None,
    sampling: SamplingParams | None = None,
    too_long: TooLong = "refuse",
    overlap: int = 64,
    combine: str = COMBINE,
    max_errors: int | None = None,
    retry_errors: bool = False,
    in_flight: int | None = None,
    progress: bool | None = None,
) -> Any:
    """Ask questions about every row of a table or file of a folder, and write a table of answers that survives crashes.

    The same call again continues where it was: rows that are answered are not computed again, whatever was killed. Rows
    and files that the source has got meanwhile are answered; one that was changed stops the batch.

    Parameters
    ----------
    source
        A path (Parquet file or folder, CSV, JSONL, OpenAI batch file, a folder of .txt, .md, .html and .pdf files), a
        pandas or Dask DataFrame, a Dask Bag of texts or records, or a pyarrow table. It is read as the batch proceeds.
    question, questions
        What is asked about each row; several questions make several rows of output. None: the text is the prompt.
    template
        Text of a prompt: ``{text}``, ``{question}`` and columns in braces; the default is the text, an empty
        line, and the question. Where the model has a chat template, the prompt is a user's message.
    out
        Folder of Parquet files, readable at any time: ``pyarrow.parquet.read_table(out)``. Rows are in the order in
        which they finished; ``row`` (or ``path``) names them. A name that ends in ``.jsonl`` is for OpenAI batch files:
        answers are written there in OpenAI's format at the end, beside a folder of that name with ``.parquet`` added.
        None returns an iterator of answers (dicts) instead, computed as it is advanced.
    text_column
        The column that holds the text.
    keep
        Columns that go to the output; None keeps all but the text.
    sampling
        For all rows; None is ``SamplingParams()``.
    too_long
        What happens to prompts longer than the model's window: ``"refuse"`` makes them error rows, ``"truncate-head"``
        (or ``-middle``, ``-tail``) leaves out that part of the document, ``"map-reduce"`` asks each of several parts
        and combines the answers.
    overlap, combine
        Map-reduce: tokens that neighbouring parts share, and the combining question, with ``{answers}`` and
        ``{question}``.
    max_errors
        Stop when more rows than this have errors; None never does.
    retry_errors
        Do the rows again that have errors from earlier runs.
    in_flight
        Requests that the cluster has at once; None is twice what all workers can decode together.
    progress
        Show a progress bar on standard error; None does so where somebody can see it.

    Returns
    -------
    BatchSummary
        An awaitable of it with an asynchronous client; with ``out=None`` an iterator of dicts.

    Raises
    ------
    SourceError, InvalidRequestError, MissingProgramError
        When the source cannot be read as it was named, or was changed; when what is asked does not go together.
    OutputError
        When ``out`` was begun with other parameters, or is being written to.
    TooManyErrorsError
        See ``max_errors``.
    EngineClosedError
        When the cluster is gone. Everything answered so far is in the output.
    """
    if question is not None and questions is not None:
        raise InvalidRequestError("give either question or questions")
    asked = (question,) if questions is None else tuple(questions)
    spec = BatchSpec(
        questions=asked,
        template=template,
        text_column=text_column,
        sampling=sampling or SamplingParams(),
        too_long=too_long,
        overlap=overlap,
        combine=combine,
    )
    job = _Job(engine, source, spec, keep, max_errors, in_flight)
    if out is None:
        return job.answers()
    if engine.client.asynchronous:
        return asyncio.to_thread(job.write, Path(out), retry_errors, progress)
    return job.write(Path(out), retry_errors, progress)


class _Job:
    """One call of :func:`process`."""

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

    def write(self, out: Path, retry_errors: bool, progress: bool | None) -> BatchSummary:
        """Answer everything that is not in the output yet."""
        from distkv_dask.client.batch.openai_format import OpenAIBatchSource
        from distkv_dask.client.batch.output import Output
        from distkv_dask.client.batch.progress import progress_bar

        began = time.monotonic()
        source = self._open()
        lines = out.suffix == ".jsonl"
        if lines and not isinstance(source, OpenAIBatchSource):
            raise OutputError(f"{out}: only answers to an OpenAI batch file are written as JSONL; name a folder")
        schema = _schema(source)
        folder = out.with_name(out.name + ".parquet") if lines else out
        parameters = {"model": self._engine.model.name, "dtype": self._engine.dtype, **self._spec.parameters()}
        with Output(folder, schema, parameters, retry_errors) as output:
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
        schema = _schema(source)
        return (row for outcomes in self._run(source, None) if outcomes for row in _batch(schema, outcomes).to_pylist())

    def _open(self) -> Source:
        from distkv_dask.client.batch.openai_format import OpenAIBatchSource
        from distkv_dask.client.batch.sources import open_source
        from distkv_dask.client.batch.tables import Columns

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
        from distkv_dask.client.batch.runner import Runner

        schema = _schema(source)
        runner = Runner(self._engine, self._spec, self._in_flight).run(self._todo(source, output))
        with contextlib.closing(runner):
            for outcomes in runner:
                if output is not None:
                    if outcomes:
                        output.append(_batch(schema, outcomes))
                    else:
                        output.rotate()
                yield outcomes
                self._errors += sum(one.error is not None for one in outcomes)
                self._check_errors(next((one.error for one in outcomes if one.error is not None), ""))

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


def _schema(source: Source) -> pa.Schema:
    """Schema of the output."""
    import pyarrow as pa

    from distkv_dask.client.batch.output import RESULT

    if taken := [name for name in source.kept.names if name in (source.label, *RESULT.names)]:
        raise SourceError(
            f"the source's column {taken[0]!r} has the name of a column of the output: leave it out by naming those to "
            f"keep (keep=...)"
        )
    label = pa.field(source.label, pa.int64() if source.label == "row" else pa.string())
    return pa.schema([label, *source.kept, *RESULT])


def _batch(schema: pa.Schema, outcomes: list[Outcome]) -> pa.RecordBatch:
    """Finished rows as rows of the output."""
    from distkv_dask.client.batch.output import result_batch

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
    }


def _write_lines(folder: Path, out: Path, model: str) -> None:
    """Write a finished output as an OpenAI output file."""
    import pyarrow.parquet as pq

    from distkv_dask.client.batch.openai_format import write_openai_answers

    unfinished = out.with_name(f".{out.name}.unfinished")
    with unfinished.open("wb") as file:
        write_openai_answers(pq.read_table(folder), model, file)
    unfinished.replace(out)
