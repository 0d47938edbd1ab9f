"""``distkv status``: all engines of a running cluster."""

from __future__ import annotations

import json
from collections import Counter
from time import sleep
from typing import TYPE_CHECKING, Any

import click
from dask.utils import format_bytes

from distkv_dask.client.commands.engines import Engines, engines_of, running_cluster
from distkv_dask.client.commands.options import running_option
from distkv_dask.messages.status import EngineSummary

if TYPE_CHECKING:
    from rich.console import RenderableType

INTERVAL = 1.0
"""Seconds between two refreshes with ``--watch``."""


@click.command("status")
@running_option
@click.option("--json", "as_json", is_flag=True, help="Print everything the engines know as JSON.")
@click.option("--watch", is_flag=True, help="Refresh every second, until Ctrl-C.")
def command(scheduler: str, as_json: bool, watch: bool) -> None:
    """Show the engines of a cluster: their model, requests, and the KV memory of each worker."""
    if as_json and watch:
        raise click.UsageError("--json prints once: leave out --watch, or repeat the command")
    with running_cluster(scheduler) as client:
        if watch:
            _watch(client)
            return
        workers, engines = engines_of(client)
    if as_json:
        click.echo(json.dumps({name: one.as_dict() for name, one in engines.items()}, indent=1))
        return
    from rich.console import Console

    Console().print(_shown(workers, engines))


def _watch(client: Any) -> None:
    from rich.live import Live

    try:
        with Live(_shown(*engines_of(client)), auto_refresh=False) as live:
            while True:
                sleep(INTERVAL)
                live.update(_shown(*engines_of(client)), refresh=True)
    except KeyboardInterrupt:
        return


def _shown(workers: int, engines: Engines) -> RenderableType:
    from rich.console import Group

    return Group(f"{workers} workers, {len(engines)} engines", *(_table(name, one) for name, one in engines.items()))


def _table(name: str, engine: EngineSummary) -> RenderableType:
    from rich.markup import escape
    from rich.table import Table

    status = engine.status
    states = Counter(one.state for one in status.sequences.values())
    requests = ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "no requests"
    finished = sum(int(count) for total, count in status.totals.items() if total.startswith("finished_"))
    title = (
        f"Engine {name}: {escape(engine.model)}\n"
        f"{requests}; {finished} finished, {status.totals.get('generated_tokens', 0)} tokens"
    )
    table = Table("worker", title=title, title_justify="left")
    pool = "KV used", "KV room", "lent to others", "documents", "cached"
    for column in (*pool, "in host memory", "on disk", "home of"):
        table.add_column(column, justify="right")
    for worker, one in status.workers.items():
        counts = one.used_blocks, one.capacity_blocks, one.blocks.lent, one.blocks.documents, one.blocks.cached
        tokens = (f"{count * status.block_tokens:,} tokens" for count in counts)
        table.add_row(worker, *tokens, format_bytes(one.host_bytes), format_bytes(one.disk_bytes), str(one.sequences))
    return table
