"""``distkv ask``: one question, its answer printed as it is generated."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from distkv_dask.client.batch.process import read_schema
from distkv_dask.client.batch.spec import BatchSpec, prompt_ids
from distkv_dask.client.commands.connect import engine_of, model_options, note, scheduler_option, size_options
from distkv_dask.errors import SourceError


@click.command("ask")
@click.argument("question")
@click.argument("document", type=click.Path(path_type=Path, allow_dash=True), required=False)
@click.option(
    "--schema",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="File with a JSON schema: the answer is JSON that follows it.",
)
@model_options
@scheduler_option
@size_options
def command(question: str, document: Path | None, schema: Path | None, **options: Any) -> None:
    """Ask QUESTION about DOCUMENT (.txt, .md, .html, .pdf, or - for standard input), or about nothing.

    \b
        distkv ask "What are the risks?" report.pdf

    The answer goes to standard output as it is generated.
    """  # noqa: D301
    with engine_of(options) as (engine, sampling):
        text = question
        if document is not None:
            text = BatchSpec(questions=(question,)).render({"text": _text(document)}, question)
        if schema is not None:
            sampling = replace(sampling, schema=read_schema(schema))
        with engine.stream(prompt_ids(text, engine.tokenizer), sampling) as pieces:
            for piece in pieces:
                click.echo(piece, nl=False)
        click.echo()
        done = pieces.completion
        if done is not None:
            workers = len(done.placement)
            note(
                f"{done.prompt_tokens} tokens on {workers} worker{'s' * (workers > 1)}, {len(done.token_ids)} new ones"
            )


def _text(document: Path) -> str:
    from distkv_dask.client.batch.extract import EXTRACTORS, check_pdf_support, plain_text

    if str(document) == "-":
        return plain_text(sys.stdin.buffer.read())
    suffix = document.suffix.lower()
    if suffix == ".pdf":
        check_pdf_support()
    try:
        return EXTRACTORS[suffix if suffix in EXTRACTORS else ".txt"](document.read_bytes())
    except OSError as error:
        raise SourceError(f"{document} cannot be read: {error}") from error
