"""``distkv ask``: one question, its answer printed as it is generated."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from distkv_dask.client.batch.process import read_schema
from distkv_dask.client.batch.spec import BatchSpec
from distkv_dask.client.commands.connect import chosen_of
from distkv_dask.client.commands.failures import clear_failures, note
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
from distkv_dask.client.documents.document import Document
from distkv_dask.client.documents.extract import plain_text
from distkv_dask.client.documents.prompts import prompt_ids, read_text
from distkv_dask.client.documents.readers import Reader
from distkv_dask.client.documents.saved_document import FILE, read_metadata
from distkv_dask.client.engine import Engine
from distkv_dask.client.session.generation import Generation, TextPieces
from distkv_dask.completion import Completion
from distkv_dask.config import Config
from distkv_dask.errors import InvalidRequestError, SourceError
from distkv_dask.filesystems import local_path
from distkv_dask.logprobs import perplexity
from distkv_dask.sampling import YES_NO, SamplingParams
from distkv_dask.watch import watched


@click.command("ask")
@click.argument("question")
@click.argument("document", required=False)
@click.option(
    "--schema",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="File with a JSON schema. The answer is JSON that follows it.",
)
@reader_option
@sampling_options
@model_options
@scheduler_option
@engine_option
@size_options
def command(question: str, document: str | None, schema: Path | None, reader: Reader, **options: Any) -> None:
    """Ask QUESTION, with or without a DOCUMENT, or with - for standard input.

    Documents are .txt, .md, .html, .pdf, .docx, .pptx and .epub files.

    \b
        distkv ask "What are the risks?" report.pdf

    DOCUMENT may also be a folder, or its URI, with a document saved by `distkv ingest`, which is not computed again.

    The answer goes to standard output as it is generated.
    """  # noqa: D301
    sampling, _ = sampling_of(options)
    chosen = chosen_of(options)
    check_drawn(sampling)
    with clear_failures():
        if schema is not None:
            sampling = replace(sampling, schema=read_schema(schema))
        begin = _question(question, document, sampling, reader)
    with chosen.engine() as engine:
        done = _told(begin(engine), sampling)
        if done is not None:
            _note_details(done, engine)
            if (quote := done.quote) is not None:
                page = "" if quote.page is None else f", page {quote.page}"
                note(f"characters {quote.start} to {quote.stop} of the document{page}")
            workers = len({span.worker for span in done.placement})
            note(
                f"{done.prompt_tokens} tokens ({done.reused_tokens} reused) on {workers} worker{'s' * (workers > 1)}, "
                f"{len(done.token_ids)} new ones"
            )


def _told(answer: TextPieces | Generation, sampling: SamplingParams) -> Completion | None:
    """Print what is answered, as it is generated if it is one text."""
    if isinstance(answer, TextPieces):
        with answer as pieces:
            for piece in pieces:
                click.echo(piece, nl=False)
        click.echo()
        return pieces.completion
    done = answer.result()
    if done.scores is not None and sampling.choices == YES_NO:
        click.echo(f"{done.scores[YES_NO[0]]:.6f}")
        return done
    click.echo("\n\n".join(one.text for one in done.answers))
    for choice, score in sorted((done.scores or {}).items(), key=lambda one: one[1], reverse=True):
        click.echo(f"{score:.6f}  {choice}")
    return done


def _note_details(done: Completion, engine: Engine) -> None:
    """Log probabilities, for people."""

    def text(token: int) -> str:
        return repr(engine.tokenizer.decode([token], special=True))

    for one in (each for answer in done.answers for each in answer.logprobs or ()):
        best = ", ".join(f"{text(token)} {logprob:.3f}" for token, logprob in one.best)
        note(f"{one.logprob:8.3f}  {text(one.token_id)}{f'   of {best}' if best else ''}")
    if done.prompt_logprobs is not None:
        note(f"perplexity of the prompt: {perplexity(done.prompt_logprobs):.4g}")


def _question(
    question: str, document: str | None, sampling: SamplingParams, reader: Reader
) -> Callable[[Engine], TextPieces | Generation]:
    """Read the document, and return a function that asks an engine and yields the answer as it is generated."""
    spec = BatchSpec(questions=(question,), sampling=sampling)
    if not question.strip():
        raise InvalidRequestError("the question is empty")
    at_once = sampling.n > 1 or sampling.best_of is not None or sampling.choices is not None
    path = None if document is None else local_path(document)
    if document is not None and document != "-" and (path is None or (path / FILE).exists()):
        limit = Config.load().timeout_files
        asyncio.run(watched(limit, f"reading the document in {document}", read_metadata, document))

        def about_saved(engine: Engine) -> TextPieces | Generation:
            saved: Document = engine.load(document, adapter=sampling.adapter)
            return saved.submit(question, sampling) if at_once else saved.stream(question, sampling)

        return about_saved
    if sampling.quotes is not None and document is None:
        raise InvalidRequestError("there is no document to quote: name one, or leave out --quotes and --evidence")
    text = question
    if path is not None:
        read = plain_text(sys.stdin.buffer.read()) if document == "-" else document_text(path, reader)
        if sampling.quotes is not None:
            return lambda engine: engine.ingest(read, adapter=sampling.adapter).stream(question, sampling)
        text = spec.render({"text": read}, question)

    def about_text(engine: Engine) -> TextPieces | Generation:
        ids = prompt_ids(text, engine.tokenizer)
        return engine.submit(ids, sampling) if at_once else engine.stream(ids, sampling)

    return about_text


def document_text(path: Path, reader: Reader) -> str:
    """The text of a document.

    Raises
    ------
    SourceError, InvalidRequestError
        When it cannot be read or is empty.
    """
    if path.is_dir():
        raise SourceError(f"{path} is a folder without a saved document: name a file, or use distkv run")
    text = read_text(path, reader)
    if not text.strip():
        raise InvalidRequestError(f"{path} is empty")
    return text
