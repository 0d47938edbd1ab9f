"""``distkv ask``: one question, its answer printed as it is generated."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from distkv_dask.client.batch.extract import plain_text
from distkv_dask.client.batch.process import read_schema
from distkv_dask.client.batch.spec import BatchSpec, prompt_ids
from distkv_dask.client.commands.connect import (
    engine_of,
    engine_option,
    model_options,
    note,
    sampling_of,
    sampling_options,
    scheduler_option,
    size_options,
)
from distkv_dask.client.document import Document
from distkv_dask.client.document_prompts import read_text
from distkv_dask.client.engine import Engine
from distkv_dask.client.generation import TextPieces
from distkv_dask.client.saved_document import FILE
from distkv_dask.types import SamplingParams


@click.command("ask")
@click.argument("question")
@click.argument("document", type=click.Path(path_type=Path, allow_dash=True), required=False)
@click.option(
    "--schema",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="File with a JSON schema: the answer is JSON that follows it.",
)
@sampling_options
@model_options
@scheduler_option
@engine_option
@size_options
def command(question: str, document: Path | None, schema: Path | None, **options: Any) -> None:
    """Ask QUESTION about DOCUMENT (.txt, .md, .html, .pdf, or - for standard input), or about nothing.

    \b
        distkv ask "What are the risks?" report.pdf

    DOCUMENT may be a folder in which `distkv ingest` saved one: then the answer begins without reading it again.

    The answer goes to standard output as it is generated.
    """  # noqa: D301
    sampling = sampling_of(options)
    with engine_of(options) as engine:
        if schema is not None:
            sampling = replace(sampling, schema=read_schema(schema))
        with _pieces(engine, question, document, sampling) as pieces:
            for piece in pieces:
                click.echo(piece, nl=False)
        click.echo()
        done = pieces.completion
        if done is not None:
            workers = len({span.worker for span in done.placement})
            note(
                f"{done.prompt_tokens} tokens ({done.reused_tokens} reused) on {workers} worker{'s' * (workers > 1)}, "
                f"{len(done.token_ids)} new ones"
            )


def _pieces(engine: Engine, question: str, document: Path | None, sampling: SamplingParams) -> TextPieces:
    """The answer as it is generated."""
    if document is not None and (document / FILE).exists():
        saved: Document = engine.load(document)
        return saved.stream(question, sampling)
    text = question
    if document is not None:
        read = plain_text(sys.stdin.buffer.read()) if str(document) == "-" else read_text(document)
        text = BatchSpec(questions=(question,)).render({"text": read}, question)
    return engine.stream(prompt_ids(text, engine.tokenizer), sampling)
