"""``distkv run``: a batch from the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, get_args

import click

from distkv_dask.client.batch.spec import COMBINE, TooLong
from distkv_dask.client.commands.connect import (
    SOME_ROWS_FAILED,
    engine_of,
    engine_option,
    model_options,
    sampling_of,
    sampling_options,
    scheduler_option,
    size_options,
)


@click.command("run")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("-q", "--question", "questions", multiple=True, help="Asked about each row; may be repeated.")
@click.option("--template", help="Text of a prompt, with {text}, {question} and columns in braces.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder of Parquet files to write.")
@click.option("--text-column", default="text", show_default=True, help="Column that holds the text.")
@click.option(
    "--keep", multiple=True, metavar="COLUMN", help="Column that goes to the output; all but the text if not given."
)
@click.option(
    "--schema",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="File with a JSON schema: answers are JSON that follows it, with a column for each property.",
)
@click.option(
    "--too-long",
    type=click.Choice(get_args(TooLong)),
    default="refuse",
    show_default=True,
    help="What happens to prompts longer than the model's window.",
)
@click.option(
    "--overlap", type=click.IntRange(0), default=64, show_default=True, help="Tokens that parts share (map-reduce)."
)
@click.option("--combine", default=COMBINE, help="Combining question, with {answers} and {question} (map-reduce).")
@click.option("--max-errors", type=click.IntRange(0), help="Stop when more rows than this have errors.")
@click.option("--retry-errors", is_flag=True, help="Do the rows again that had errors in earlier runs.")
@click.option("--in-flight", type=click.IntRange(1), help="Requests that the cluster has at once.")
@sampling_options
@model_options
@scheduler_option
@engine_option
@size_options
def command(source: Path, questions: tuple[str, ...], out: Path, keep: tuple[str, ...], **options: Any) -> None:
    """Ask questions about every row of SOURCE and write a table of answers.

    SOURCE is a Parquet file or folder, a CSV or JSONL file, an OpenAI batch file, a document, or a folder of documents
    (.txt, .md, .html, .pdf).

    \b
        distkv run reports/ --question "Who is the chief executive?" --out answers.parquet

    The answers can be read at any time: pyarrow.parquet.read_table("answers.parquet"). If anything is killed or breaks,
    repeat the same command: it goes on where it was. A row that cannot be answered says why in its column "error".

    Exit status: 0 if every row has an answer, 3 if some rows have errors, 1 if the batch could not be done (what is
    answered so far is kept), 2 if the command line is wrong.
    """  # noqa: D301
    sampling = sampling_of(options)
    with engine_of(options) as engine:
        done = engine.process(
            source,
            questions=questions or None,
            out=out,
            keep=keep or None,
            sampling=sampling,
            **options,
        )
    errors = f", {done.errors} with errors" if done.errors else ""
    click.echo(
        f"{done.rows} rows in {done.out}{errors}; {done.rows - done.earlier} of them new, in {done.seconds:.1f} s"
    )
    if done.errors:
        sys.exit(SOME_ROWS_FAILED)
