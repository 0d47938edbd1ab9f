"""``distkv run``: a batch from the command line."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click

from distkv_dask.client.batch.job import Job, parameters_of
from distkv_dask.client.batch.manifest import begun_with
from distkv_dask.client.batch.openai_format import OpenAIBatchSource, default_sampling
from distkv_dask.client.batch.process import spec_of
from distkv_dask.client.batch.results import Results
from distkv_dask.client.batch.sources import located, source_for
from distkv_dask.client.batch.spec import COMBINE, OVERLAP, TEXT, TooLong
from distkv_dask.client.batch.summary import BatchSummary
from distkv_dask.client.batch.target import check_target, target_of
from distkv_dask.client.commands.connect import chosen_of
from distkv_dask.client.commands.failures import SOME_ROWS_FAILED, clear_failures
from distkv_dask.client.commands.options import (
    check_drawn,
    engine_option,
    model_options,
    sampling_of,
    sampling_options,
    scheduler_option,
    size_options,
)


@click.command("run")
@click.argument("source")
@click.option("-q", "--question", "questions", multiple=True, help="Question about each row; may be repeated.")
@click.option("--template", help="Prompt template, with {text}, {question} and other columns in braces.")
@click.option("-o", "--out", required=True, help="Folder of Parquet files to write.")
@click.option("--text-column", default=TEXT, show_default=True, help="Column that holds the text.")
@click.option(
    "--keep", multiple=True, metavar="COLUMN", help="Column to copy to the output; by default all but the text."
)
@click.option(
    "--schema",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="File with a JSON schema. Answers are JSON that follows it; each property gets a column.",
)
@click.option(
    "--too-long",
    type=click.Choice(get_args(TooLong)),
    default="refuse",
    show_default=True,
    help="What to do with prompts longer than the model's window.",
)
@click.option(
    "--overlap",
    type=click.IntRange(0),
    default=OVERLAP,
    show_default=True,
    help="Tokens that neighbouring parts share (map-reduce).",
)
@click.option(
    "--combine", default=COMBINE, help="Question that combines parts, with {answers} and {question} (map-reduce)."
)
@click.option("--max-errors", type=click.IntRange(0), help="Stop if more rows than this have errors.")
@click.option("--retry-errors", is_flag=True, help="Repeat rows that had errors in earlier runs.")
@click.option("--in-flight", type=click.IntRange(1), help="Most requests to run at once.")
@sampling_options
@model_options
@scheduler_option
@engine_option
@size_options
def command(out: str, **options: Any) -> None:
    """Ask questions about every row of SOURCE and write a table of answers.

    SOURCE is a Parquet file or folder, a CSV or JSONL file, an OpenAI batch file, a document, or a folder of documents
    (.txt, .md, .html, .pdf).

    \b
        distkv run reports/ --question "Who is the chief executive?" --out answers.parquet

    The answers can be read at any time: pyarrow.parquet.read_table("answers.parquet"). If anything is killed or breaks,
    repeat the same command: it continues where it stopped. If a row cannot be answered, its column "error" says why.

    Exit status: 0 if every row has an answer, 3 if some rows have errors, 1 if the batch failed (answers so far are
    kept), 2 if the command line is wrong.
    """  # noqa: D301
    done = _run(out, options)
    errors = f", {done.errors} with errors" if done.errors else ""
    click.echo(
        f"{done.rows} rows in {done.out}{errors}; {done.rows - done.earlier} of them new, in {done.seconds:.1f} s"
    )
    if done.errors:
        sys.exit(SOME_ROWS_FAILED)


def _run(out: str, options: dict[str, Any]) -> BatchSummary:
    """Check everything, then run the batch."""
    sampling, said = sampling_of(options)
    chosen = chosen_of(options)
    max_errors, retry_errors, in_flight = (options.pop(name) for name in ("max_errors", "retry_errors", "in_flight"))
    path, keep = options.pop("source"), options.pop("keep") or None
    with clear_failures():
        path = located(path)
        # An OpenAI batch file has its own defaults.
        given = {name: getattr(sampling, name) for name in said}
        questions = options.pop("questions") or None
        spec = spec_of(questions, replace(default_sampling(path), **given), **options)
        source = source_for(path, spec, keep, None)
        requests = isinstance(source, OpenAIBatchSource)
        if not requests:
            check_drawn(sampling)
        target = target_of(out, path, requests)
        begun = None
        if chosen.source is not None:
            begun = begun_with(Results(source, spec).schema, parameters_of(spec, chosen.source, chosen.model["dtype"]))
        check_target(target, begun)
    with chosen.session(texts=not requests) as session:
        return Job(session, source, spec, max_errors, in_flight).write(target, retry_errors, None)
