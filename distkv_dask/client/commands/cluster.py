"""``distkv cluster``: a Dask cluster on this machine for other commands, optionally with a loaded model."""

from __future__ import annotations

import signal
import threading
from typing import Any

import click

from distkv_dask.client.commands.connect import MODEL, check_cluster, check_model, local_cluster, weights_of
from distkv_dask.client.commands.failures import clear_failures
from distkv_dask.client.commands.options import model_options, size_options, was_given
from distkv_dask.client.engine import Engine
from distkv_dask.client.listener import listener_at
from distkv_dask.models.source import resolve_model


@click.command("cluster")
@size_options
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 also serves other machines."
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8786,
    show_default=True,
    help="Port of the scheduler; 0 takes any free port.",
)
@click.option("--dashboard-port", type=click.IntRange(0, 65535), default=8787, show_default=True)
@click.option("--load", is_flag=True, help="Load --model, for commands with --engine auto.")
@model_options
def command(
    workers: int | None,
    threads: int | None,
    memory_limit: str | None,
    host: str,
    port: int,
    dashboard_port: int,
    load: bool,
    **model: Any,
) -> None:
    """Start a Dask cluster on this machine and keep it until Ctrl-C.

    \b
        distkv cluster &
        distkv run reports/ --question "Who signed?" --out answers.parquet --scheduler tcp://127.0.0.1:8786

    The first line of output is the scheduler's address. Each command loads its own model, unless the cluster keeps one:

    \b
        distkv cluster --load --model smollm2-135m &
        distkv ask "Who was Ada Lovelace?" --scheduler tcp://127.0.0.1:8786 --engine auto
    """  # noqa: D301
    if not load and (given := [name for name in MODEL if was_given(name)]):
        raise click.UsageError(f"--{given[0].replace('_', '-')} applies to the model that --load loads: add --load")
    weights = None
    with clear_failures():
        check_cluster(None)
        listener_at(host, port).close()
        if load:
            check_model(source := resolve_model(model["model"], model["rope_scaling"]), texts=False)
            weights = weights_of(source, model["dtype"])
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())
    settings = {"host": host, "scheduler_port": port, "dashboard_address": f":{dashboard_port}"}
    with local_cluster(workers, threads, memory_limit, weights, **settings) as cluster:
        click.echo(cluster.scheduler_address)
        click.echo(f"{len(cluster.workers)} workers, dashboard {cluster.dashboard_link}")
        if not load:
            over.wait()
            return
        from distributed import Client

        with clear_failures(), Client(cluster) as client, Engine(client, **model) as engine:
            click.echo(f"engine {engine.id}: {engine.model.name}")
            over.wait()
