"""``engine.process``: a table or folder of documents goes in, a table of answers comes out, in files or as a frame."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from distkv_dask.client.batch.estimate import Estimate, estimate_batch
from distkv_dask.client.batch.job import Job
from distkv_dask.client.batch.openai_format import OpenAIBatchSource, default_sampling
from distkv_dask.client.batch.sources import located, source_for
from distkv_dask.client.batch.spec import COMBINE, OVERLAP, TEXT, BatchSpec, TooLong
from distkv_dask.client.batch.target import target_of
from distkv_dask.client.documents.readers import Reader
from distkv_dask.client.session.session import Session
from distkv_dask.errors import InvalidRequestError
from distkv_dask.sampling import SamplingParams


class Processing:
    """What an engine does with whole tables and folders."""

    _session: Session

    def process(
        self,
        source: Any,
        *,
        question: str | None = None,
        questions: Sequence[str] | None = None,
        template: str | None = None,
        out: str | PathLike[str] | None = None,
        text_column: str = TEXT,
        keep: Sequence[str] | None = None,
        sampling: SamplingParams | None = None,
        schema: Mapping[str, Any] | str | PathLike[str] | None = None,
        too_long: TooLong = "refuse",
        overlap: int = OVERLAP,
        combine: str = COMBINE,
        reader: Reader = "auto",
        adapter_column: str | None = None,
        max_errors: int | None = None,
        retry_errors: bool = False,
        in_flight: int | None = None,
        progress: bool | None = None,
    ) -> Any:
        """Ask questions about every row of a table or file of a folder.

        With ``out``, the answers are written to a table that survives crashes. Without it, they are a lazy Dask
        DataFrame.

        Repeating a call with ``out`` continues where it stopped, whatever was killed: answered rows are not computed
        again. Rows and files added to the source since then are answered; a changed row or file stops the batch.

        Parameters
        ----------
        source
            A path (Parquet, CSV, JSONL, a folder of one of them, OpenAI batch file, a folder of .txt, .md, .html, .pdf,
            .docx, .pptx and .epub files, a Delta table, a saved data set of Hugging Face), a pandas or Dask DataFrame,
            a Dask Bag of texts or records, a pyarrow table, or any table that can be read as an Arrow stream: a data
            set of Hugging Face, a Delta or Iceberg table, a frame of polars, a query of DuckDB, a pyarrow dataset. The
            source is read as the batch proceeds, in its order, which has to be the same when the call is repeated.
        question, questions
            Question about each row; several questions give several rows of output. None: the text is the prompt.
        template
            Text of a prompt, with ``{text}``, ``{question}`` and columns in braces. The default is the text, an empty
            line, and the question. If the model has a chat template, the prompt is a user's message.
        out
            Folder of Parquet files, readable at any time: ``pyarrow.parquet.read_table(out)``. Rows are in the order in
            which they finished; ``row`` (or ``path``) names them. ``_README.md`` and ``_distkv.json`` in it record what
            answered. A name that ends in ``.jsonl`` is for OpenAI batch
            files: at the end, answers are written there in OpenAI's format, next to a folder of that name with
            ``.parquet`` added. None returns a lazy Dask DataFrame instead. Its tasks read files where they run and
            attach to the engine (:meth:`distkv_dask.Engine.attach`), which has to stay open. Its rows are in the order
            of the source, a row for each question. Frames and Arrow tables keep their index, Dask collections their
            partitions.
        text_column
            The column that holds the text.
        keep
            Columns to copy to the output; None keeps all but the text.
        sampling
            For all rows; None means ``SamplingParams()``. For OpenAI batch files, it applies where a request sets
            nothing, and None means OpenAI's own temperature of 1.
        schema
            A JSON schema, or the name of a file that holds one. Answers are JSON that follows it (with map-reduce, the
            combined answers), and the output has a column for each property. An answer that ``max_new_tokens`` cuts
            short is an error row.
        too_long
            What to do with prompts longer than the model's window: ``"refuse"`` makes them error rows,
            ``"truncate-head"`` (or ``-middle``, ``-tail``) leaves out that part of the document, and ``"map-reduce"``
            asks about several parts and combines the answers.
        overlap, combine
            For map-reduce: tokens that neighbouring parts share, and the question that combines answers, with
            ``{answers}`` and ``{question}``.
        reader
            What reads documents, on the workers: ``"pypdf"`` reads PDFs page by page; ``"docling"`` gives Markdown of
            PDFs with their layout and tables (it needs models, see the guide), and of .html, .docx, .pptx and .epub.
            ``"auto"`` takes pypdf for PDFs and docling for what only it reads.
        adapter_column
            A column with the path of each row's LoRA adapter (:attr:`SamplingParams.adapter`), absolute; rows without a
            value have that of ``sampling``, or none.
        max_errors
            Stop if more rows than this have errors; None never stops. Each partition of a Dask DataFrame counts
            separately.
        retry_errors
            Repeat rows that had errors in earlier runs.
        in_flight
            Most requests to run at once; None means twice what all workers can decode together. For a Dask DataFrame,
            requests of each partition; None means what one worker can decode together.
        progress
            Show a progress bar on standard error; None shows it if somebody can see it.

        Returns
        -------
        BatchSummary
            With ``out=None`` a ``dask.dataframe.DataFrame``. With an asynchronous client, an awaitable of either.

        Raises
        ------
        SourceError, InvalidRequestError, MissingProgramError
            When the source cannot be read or was changed, or when parameters contradict each other.
        OutputError
            When ``out`` was begun with other parameters, or is being written to.
        TooManyErrorsError
            See ``max_errors``.
        EngineClosedError
            When the cluster is gone. Everything answered so far is in the output.
        """
        if question is not None and questions is not None:
            raise InvalidRequestError("give either question or questions")
        if out is None and retry_errors:
            raise InvalidRequestError("retry_errors needs the output of an earlier run: name it with out=...")
        if out is None and progress:
            raise InvalidRequestError("a lazy Dask DataFrame has no progress bar: leave out progress, or give out=...")
        source = located(source)
        spec = spec_of(
            questions=questions if question is None else [question],
            template=template,
            text_column=text_column,
            sampling=default_sampling(source) if sampling is None else sampling,
            schema=schema,
            too_long=too_long,
            overlap=overlap,
            combine=combine,
            reader=reader,
            adapter_column=adapter_column,
        )

        session = self._session

        def work() -> Any:
            if out is None:
                from distkv_dask.client.batch.lazy import answers_frame  # imports pandas, which is rarely needed

                return answers_frame(session, source, spec, keep, max_errors, in_flight)
            opened = source_for(source, spec, keep, session.client)
            target = target_of(out, source, isinstance(opened, OpenAIBatchSource))
            return Job(session, opened, spec, max_errors, in_flight).write(target, retry_errors, progress)

        return asyncio.to_thread(work) if session.client.asynchronous else work()

    def estimate(
        self,
        source: Any,
        *,
        question: str | None = None,
        questions: Sequence[str] | None = None,
        sampling: SamplingParams | None = None,
        schema: Mapping[str, Any] | str | PathLike[str] | None = None,
        **how: Any,
    ) -> Any:
        """Say what :meth:`process` would take, and which rows it would refuse; nothing is answered.

        Tokens are counted by the model's tokenizer, of many rows by the workers. The time follows from the speeds of
        the workers (:class:`~distkv_dask.messages.status.WorkerPerformance`), if no other requests use the engine.

        Parameters
        ----------
        source, question, questions, sampling, schema
            As for :meth:`process`.
        **how
            ``template``, ``text_column``, ``too_long``, ``overlap``, ``combine``, ``reader`` and ``adapter_column``, as
            there.

        Returns
        -------
        Estimate
            It holds if every answer is as long as ``max_new_tokens`` allows. With an asynchronous client, an awaitable.

        Raises
        ------
        SourceError, InvalidRequestError, MissingProgramError
            As :meth:`process` does.
        """
        if question is not None and questions is not None:
            raise InvalidRequestError("give either question or questions")
        source = located(source)
        drawn = default_sampling(source) if sampling is None else sampling
        spec = spec_of(questions if question is None else [question], drawn, schema, **how)
        session = self._session

        def work() -> Estimate:
            return estimate_batch(session, source_for(source, spec, None, session.client), spec)

        return asyncio.to_thread(work) if session.client.asynchronous else work()


def spec_of(
    questions: Sequence[str] | None,
    sampling: SamplingParams,
    schema: Mapping[str, Any] | str | PathLike[str] | None,
    **options: Any,
) -> BatchSpec:
    """The batch's settings; raises as :func:`read_schema` and :class:`BatchSpec` do."""
    if isinstance(questions, str):
        raise InvalidRequestError(f"questions is the text {questions!r:.100}: give a list, or question=... for one")
    if schema is not None:
        sampling = replace(sampling, schema=read_schema(schema))
    return BatchSpec(questions=(None,) if questions is None else tuple(questions), sampling=sampling, **options)


def read_schema(schema: Mapping[str, Any] | str | PathLike[str]) -> Mapping[str, Any]:
    """Return a JSON schema, read from a file where one is named.

    Raises
    ------
    InvalidRequestError
        When the file cannot be read, or holds no JSON object.
    """
    if isinstance(schema, Mapping):
        return schema
    try:
        read = json.loads(Path(schema).read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"the JSON schema {str(schema)!r} cannot be read: {error}") from error
    if not isinstance(read, dict):
        raise InvalidRequestError(f"the JSON schema {str(schema)!r} should be a JSON object")
    return read
