"""``distkv ingest``: computes a document's KV cache once and saves it for later questions."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import click

from distkv_dask.client.commands.ask import document_text
from distkv_dask.client.commands.connect import chosen_of
from distkv_dask.client.commands.failures import clear_failures, note
from distkv_dask.client.commands.options import (
    LocalFile,
    adapter_option,
    engine_option,
    model_options,
    reader_option,
    scheduler_option,
    size_options,
)
from distkv_dask.client.documents.readers import Reader
from distkv_dask.client.documents.save import try_place
from distkv_dask.config import Config
from distkv_dask.watch import watched


@click.command("ingest")
@click.argument("document", type=LocalFile())
@click.argument("folder")
@reader_option
@adapter_option
@model_options
@scheduler_option
@engine_option
@size_options
def command(document: Path, folder: str, reader: Reader, adapter: str | None, **options: Any) -> None:
    """Compute the KV cache of DOCUMENT (.txt, .md, .html, .pdf, .docx, .pptx, .epub) and save it in FOLDER.

    \b
        distkv ingest report.pdf saved/report
        distkv ask "What are the risks?" saved/report

    FOLDER is a path or a URI such as s3://bucket/report that all workers can reach. Later questions on the document
    start at once, on any number of workers, with the same --model, --dtype, --adapter and block size.
    """  # noqa: D301
    chosen = chosen_of(options)
    with clear_failures():
        text = document_text(document, reader)
        asyncio.run(watched(Config.load().timeout_files, f"looking at {folder}", try_place, folder))
    with chosen.engine() as engine:
        note(f"Computing {document} ...")
        with engine.ingest(text, name=document.name, adapter=adapter) as handle:
            handle.save(folder)
            click.echo(f"{handle.tokens} tokens saved in {folder}")
