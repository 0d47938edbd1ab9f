"""One run of a batch: answers the rows that the output lacks, into a folder or into a table in memory."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from distkv_dask.client.batch.answer_plan import check_servable
from distkv_dask.client.batch.documents import DocumentSource
from distkv_dask.client.batch.means import means_of
from distkv_dask.client.batch.meter import Meter
from distkv_dask.client.batch.openai_format import OpenAIBatchSource, write_openai_answers
from distkv_dask.client.batch.output import Output
from distkv_dask.client.batch.pace import new_tokens
from distkv_dask.client.batch.progress import progress_bar
from distkv_dask.client.batch.reading import read_ahead
from distkv_dask.client.batch.record import Run
from distkv_dask.client.batch.results import Lot, Results
from distkv_dask.client.batch.rows import Row, Source
from distkv_dask.client.batch.runner import Runner
from distkv_dask.client.batch.spec import BatchSpec
from distkv_dask.client.batch.summary import BatchSummary
from distkv_dask.client.batch.target import Target
from distkv_dask.errors import OutputError, SourceError, TooManyErrorsError, in_words
from distkv_dask.local_folder import sync

if TYPE_CHECKING:
    from distkv_dask.client.session.session import Session
    from distkv_dask.models.source import ModelSource


class Job:
    """One run; :func:`distkv_dask.client.batch.process.process` describes the parameters."""

    def __init__(
        self,
        session: Session,
        source: Source,
        spec: BatchSpec,
        max_errors: int | None = None,
        in_flight: int | None = None,
    ) -> None:
        self._session = session
        self._source = source
        self._spec = spec
        self._max_errors = max_errors
        self._in_flight = in_flight or 2 * session.config.window_batch * session.facts.workers
        if not isinstance(source, OpenAIBatchSource):
            check_servable(spec, session.tokenizer, session.facts.max_positions)
        self._errors = 0
        self._results = Results(source, spec, session.model)

    def write(
        self,
        target: Target,
        retry_errors: bool,
        progress: bool | None,
        on_tick: Callable[[int, int], None] | None = None,
    ) -> BatchSummary:
        """Answer everything that is not in the output yet.

        ``on_tick`` is called every second or so with the rows that are done and those of them that have errors; what it
        raises ends the run.
        """
        began = time.monotonic()
        if self._spec.sampling.adapter is not None:
            self._session.try_adapter(self._spec.sampling.adapter)
        folder = target.folder
        parameters = parameters_of(self._spec, self._session.model, self._session.dtype)
        with (
            Output(folder, self._results.schema, parameters, retry_errors) as output,
            self._session.in_span("distkv", f"batch {folder.name}"),
        ):
            earlier, self._errors = len(output.done), output.errors
            run = Run(self._session, output.recorded, target.source)
            output.keep(run.record(output.parts))
            try:
                rows = self._fill(output, run, progress, on_tick)
            except BaseException as error:
                with contextlib.suppress(OutputError):  # which may be what ended it
                    output.rotate(now=True)
                    output.keep(run.record(output.parts, f"stopped: {in_words(error)}"))
                raise
            output.rotate(now=True)
            output.keep(run.record(output.parts, "completed"))
            if target.lines is not None:
                _write_lines(folder, target.lines, self._session.model.name)
        return BatchSummary(target.path, rows, earlier, self._errors, time.monotonic() - began)

    def _fill(self, output: Output, run: Run, progress: bool | None, on_tick: Callable[[int, int], None] | None) -> int:
        """Answer what an output lacks; returns how many rows it has then."""
        rows, total = len(output.done), self._source.count()
        total = None if total is None else total * len(self._spec.questions)
        with progress_bar(total, rows, self._errors, progress) as advance:
            meter = None if advance is None else self._meter(total, output.done)
            self._check_errors(f"in {output.path} already")
            todo = self._todo(output.done)
            if isinstance(self._source, DocumentSource):
                todo = read_ahead(todo, self._session)
            for lot in self._run(todo):
                if lot is None:
                    output.rotate()
                else:
                    output.append(lot.batch)
                    run.add(lot)
                    rows += len(lot.outcomes)
                if advance is not None and meter is not None:
                    meter.add(() if lot is None else lot.outcomes)
                    ended, failed = (0, 0) if lot is None else (len(lot.outcomes), len(lot.errors))
                    advance(ended, failed, meter.left(self._runner.flying))
                if on_tick is not None:
                    on_tick(rows, self._errors)
        return rows

    def table(self, start: int = 0, stop: int | None = None, on_tick: Callable[[], None] | None = None) -> pa.Table:
        """Answer rows ``start`` to ``stop`` of the source, and return them in its order.

        ``on_tick`` is called every second or so; what it raises ends the run.
        """
        rows = None if stop is None else (stop - start) * len(self._spec.questions)
        todo = list(itertools.islice(self._todo({}, start), rows))
        found: dict[tuple[int | str, str | None], pa.RecordBatch] = {}
        with contextlib.closing(self._run(iter(todo))) as run:
            for lot in run:
                if lot is not None:
                    for at, one in enumerate(lot.outcomes):
                        found[one.row.label, one.question] = lot.batch.slice(at, 1)
                if on_tick is not None:
                    on_tick()
        return pa.Table.from_batches([found[row.label, question] for row, question in todo], self._results.schema)

    def _meter(self, total: int | None, done: Mapping[tuple[int | str, str | None], str]) -> Meter:
        """The meter of the work that is left."""
        answered = {label for label, _ in done}
        sizes = self._source.sizes() if isinstance(self._source, DocumentSource) else {}
        left = {label: size for label, size in sizes.items() if label not in answered}
        means = means_of(self._session)
        together = min(means.batch, max(1, self._in_flight // len(means.speeds)))
        return Meter(None if total is None else total - len(done), left, new_tokens(means.speeds[0], together))

    def _run(self, todo: Iterator[tuple[Row, str | None]]) -> Generator[Lot | None]:
        """Answer rows; yields them as they finish, and None now and then."""
        self._runner = Runner(self._session, self._spec, self._in_flight)
        with contextlib.closing(self._runner.run(todo)) as ends:
            for ended in ends:
                if not ended:
                    yield None
                    continue
                lot = self._results.lot(ended)
                self._errors += len(lot.errors)  # first, so that callers get the rows together with the count of errors
                yield lot
                self._check_errors(next(iter(lot.errors), ""))

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

    def _check_errors(self, last: str) -> None:
        if self._max_errors is not None and self._errors > self._max_errors:
            raise TooManyErrorsError(
                f"{self._errors} rows have errors, more than max_errors={self._max_errors}; one of them: {last}"
            )


def parameters_of(spec: BatchSpec, model: ModelSource, dtype: str) -> dict[str, Any]:
    """Everything that the answers of a batch depend on, apart from the source's columns."""
    return {"model": model.name, "rope_scaling": model.rope_scaling, "dtype": dtype, **spec.parameters()}


def _write_lines(folder: Path, out: Path, model: str) -> None:
    """Write a finished output as an OpenAI output file."""
    unfinished = out.with_name(f".{out.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            write_openai_answers(pq.read_table(folder, partitioning=None), model, file)
        sync(unfinished)
        unfinished.replace(out)
        sync(out.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise OutputError(
            f"{out} cannot be written: {error}. All answers are in {folder}; repeat the command when there is room."
        ) from error
