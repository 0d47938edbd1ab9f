"""``distkv run``: a batch from the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple, get_args

import click

from distkv_dask.client.batch.job import Job, parameters_of
from distkv_dask.client.batch.manifest import begun_with
from distkv_dask.client.batch.openai_format import OpenAIBatchSource, default_sampling
from distkv_dask.client.batch.process import spec_of
from distkv_dask.client.batch.results import Results
from distkv_dask.client.batch.rows import Source
from distkv_dask.client.batch.sources import located, source_for
from distkv_dask.client.batch.spec import COMBINE, OVERLAP, TEXT, BatchSpec, TooLong
from distkv_dask.client.batch.summary import BatchSummary
from distkv_dask.client.batch.target import check_target, target_of
from distkv_dask.client.commands.connect import Chosen, chosen_of
from distkv_dask.client.commands.dry_run import dry_run
from distkv_dask.client.commands.failures import SOME_ROWS_FAILED, clear_failures
from distkv_dask.client.commands.options import (
    check_drawn,
    engine_option,
    model_options,
    reader_option,
    sampling_of,
    sampling_options,
    scheduler_option,
    size_options,
)
from distkv_dask.sampling import Embed
from distkv_dask.scheduler.costs.presets import PRESETS


@click.command("run")
@click.argument("source")
@click.option("-q", "--question", "questions", multiple=True, help="Question about each row; may be repeated.")
@click.option("--template", help="Prompt template, with {text}, {question} and other columns in braces.")
@click.option("-o", "--out", help="Folder of Parquet files to write.")
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
@reader_option
@click.option(
    "--adapter-column", metavar="COLUMN", help="Column with the folder of each row's LoRA adapter; empty: --adapter."
)
@click.option(
    "--embed",
    type=click.Choice(get_args(Embed)),
    help="Answer nothing: write each text's embedding, the mean of all tokens' hidden states or the last token's.",
)
@click.option("--normalize", is_flag=True, default=None, help="Make all embeddings vectors of length 1.")
@click.option("--max-errors", type=click.IntRange(0), help="Stop if more rows than this have errors.")
@click.option("--retry-errors", is_flag=True, help="Repeat rows that had errors in earlier runs.")
@click.option("--in-flight", type=click.IntRange(1), help="Most requests to run at once.")
@click.option(
    "--dry-run",
    "dry",
    is_flag=True,
    help="Answer nothing: count tokens, and say which rows will be refused and how long the others will take.",
)
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    help="With --dry-run: no cluster is needed, and --workers workers are as fast as those of this preset.",
)
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: print JSON.")
@sampling_options
@model_options
@scheduler_option
@engine_option
@size_options
def command(out: str | None, dry: bool, preset: str | None, as_json: bool, **options: Any) -> None:
    """Ask questions about every row of SOURCE and write a table of answers.

    SOURCE is a Parquet file or folder, a CSV or JSONL file, an OpenAI batch file, a Delta table, a saved data set of
    Hugging Face, a document, or a folder of documents (.txt, .md, .html, .pdf, .docx, .pptx, .epub).

    \b
        distkv run reports/ --question "Who is the chief executive?" --out answers.parquet

    The answers can be read at any time: pyarrow.parquet.read_table("answers.parquet"). If anything is killed or breaks,
    repeat the same command: it continues where it stopped. If a row cannot be answered, its column "error" says why.

    Exit status: 0 if every row has an answer, 3 if some rows have errors, 1 if the batch failed (answers so far are
    kept), 2 if the command line is wrong.

    With --dry-run nothing is answered; what is printed holds if every answer is as long as --max-new-tokens allows.
    """  # noqa: D301
    if not dry and (preset is not None or as_json):
        raise click.UsageError("--preset and --json are for --dry-run: add that, or leave them out")
    if dry:
        chosen, source, spec, *_ = _asked(options)
        dry_run(chosen, source, spec, preset, as_json)
        return
    if out is None:
        raise click.UsageError("Missing option '-o' / '--out': name a folder for the answers, or add --dry-run")
    done = _run(out, options)
    errors = f", {done.errors} with errors" if done.errors else ""
    click.echo(
        f"{done.rows} rows in {done.out}{errors}; {done.rows - done.earlier} of them new, in {done.seconds:.1f} s"
    )
    if done.errors:
        sys.exit(SOME_ROWS_FAILED)


class _Asked(NamedTuple):
    """The questions of a run, its source, cluster and model; and its course."""

    chosen: Chosen
    source: Source
    spec: BatchSpec
    path: Any
    how: dict[str, Any]


def _asked(options: dict[str, Any]) -> _Asked:
    """Check everything that needs no cluster and no output."""
    sampling, said = sampling_of(options)
    chosen = chosen_of(options)
    how = {name: options.pop(name) for name in ("max_errors", "retry_errors", "in_flight")}
    path, keep = options.pop("source"), options.pop("keep") or None
    with clear_failures():
        path = located(path)
        # An OpenAI batch file has its own defaults.
        given = {name: getattr(sampling, name) for name in said}
        questions = options.pop("questions") or None
        spec = spec_of(questions, default_sampling(path).updated(given), **options)
        source = source_for(path, spec, keep, None)
        if not isinstance(source, OpenAIBatchSource):
            check_drawn(sampling)
    return _Asked(chosen, source, spec, path, how)


def _run(out: str, options: dict[str, Any]) -> BatchSummary:
    """Check everything, then run the batch."""
    chosen, source, spec, path, how = _asked(options)
    requests = isinstance(source, OpenAIBatchSource)
    with clear_failures():
        target = target_of(out, path, requests)
        begun = None
        if chosen.source is not None:
            schema = Results(source, spec, chosen.source).schema
            begun = begun_with(schema, parameters_of(spec, chosen.source, chosen.model["dtype"]))
        check_target(target, begun)
    with chosen.session(texts=not requests) as session:
        job = Job(session, source, spec, how["max_errors"], how["in_flight"])
        return job.write(target, how["retry_errors"], None)
