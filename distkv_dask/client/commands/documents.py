"""``distkv documents``: the documents that the engines of a running cluster keep."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import click

from distkv_dask.client.commands.engines import engines_of, running_cluster
from distkv_dask.client.commands.options import running_option
from distkv_dask.messages.status import EngineStatus, SequenceStatus

STATES = {"document": "stored", "dropped": "evicted; recomputed at the next question"}
"""Names of a document's states for users, where they differ."""

SAVED = "in files; read at the next question"
"""The name of the state of an evicted document that was saved or spilled."""


@click.command("documents")
@running_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(scheduler: str, as_json: bool) -> None:
    """List the documents of a cluster's engines: tokens, running questions, and where their KV is."""
    with running_cluster(scheduler) as client:
        _, engines = engines_of(client)
    found = [_row(engine, one) for engine, opened in engines.items() for one in _documents(opened.status)]
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("engine", "document", title=f"{len(found)} documents", title_justify="left")
    table.add_column("tokens", justify="right")
    table.add_column("questions", justify="right")
    table.add_column("state")
    table.add_column("tokens by worker")
    for one in found:
        where = "\n".join(f"{worker}: {tokens:,}" for worker, tokens in one["workers"].items())
        cells = one["engine"], escape(one["name"]), f"{one['tokens']:,}", str(one["questions"]), one["state"], where
        table.add_row(*cells)
    Console().print(table)


def _documents(status: EngineStatus) -> list[SequenceStatus]:
    return [one for one in status.sequences.values() if one.document]


def _row(engine: str, document: SequenceStatus) -> dict[str, Any]:
    workers: Counter[str] = Counter()
    for span in document.placement:
        workers[span.worker] += span.tokens
    state = STATES.get(document.state, document.state)
    return {
        "engine": engine,
        "name": document.name or "a turn of a chat",
        "tokens": document.prompt_tokens,
        "questions": document.questions,
        "state": SAVED if (document.state, document.saved) == ("dropped", True) else state,
        "workers": dict(workers),
    }
