"""``distkv status``: the engines of a running cluster, whoever opened them."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import click

from distkv_dask.client.commands.connect import client_of, failing_clearly, scheduler_option
from distkv_dask.protocol import ClientCall


@click.command("status")
@scheduler_option
@click.option("--json", "as_json", is_flag=True, help="Everything there is to know, as JSON.")
def command(scheduler: str | None, as_json: bool) -> None:
    """Show the engines of a cluster: their model, requests, and the KV memory of each worker."""
    if scheduler is None:
        raise click.UsageError("--scheduler ADDRESS says which cluster")
    with failing_clearly(), client_of(scheduler) as client:
        engines: dict[str, Any] = client.sync(_engines, client) or {}
        workers = len(client.scheduler_info(n_workers=-1)["workers"])
    if as_json:
        click.echo(json.dumps(engines, indent=1))
        return
    click.echo(f"{workers} workers, {len(engines)} engines")
    for name, engine in engines.items():
        _show(name, engine)


async def _engines(client: Any) -> Any:
    return await getattr(client.scheduler, ClientCall.ENGINES)()


def _show(name: str, engine: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    states = Counter(one["state"] for one in engine["sequences"].values())
    requests = ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "no requests"
    totals = engine["totals"]
    finished = sum(int(count) for total, count in totals.items() if total.startswith("finished_"))
    title = (
        f"Engine {name}: {engine['model']}\n{requests}; {finished} finished, {totals.get('generated_tokens', 0)} tokens"
    )
    table = Table("worker", title=title, title_justify="left")
    for column in ("KV used", "KV room", "lent to others", "home of"):
        table.add_column(column, justify="right")
    for worker, one in engine["workers"].items():
        room, used, lent = (
            one[key] * engine["block_tokens"] for key in ("capacity_blocks", "used_blocks", "lent_blocks")
        )
        table.add_row(worker, f"{used} tokens", f"{room} tokens", f"{lent} tokens", str(one["sequences"]))
    Console().print(table)
