"""``distkv cluster``: a Dask cluster on this machine that other commands and programs connect to."""

from __future__ import annotations

import signal
import threading

import click

from distkv_dask.client.commands.connect import local_cluster, size_options


@click.command("cluster")
@size_options
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for other machines too."
)
@click.option("--port", type=click.IntRange(0, 65535), default=8786, show_default=True, help="0 takes any free one.")
@click.option("--dashboard-port", type=click.IntRange(0, 65535), default=8787, show_default=True)
def command(
    workers: int | None, threads: int | None, memory_limit: str | None, host: str, port: int, dashboard_port: int
) -> None:
    """Start a Dask cluster on this machine and keep it until Ctrl-C.

    \b
        distkv cluster &
        distkv run reports/ --question "Who signed?" --out answers.parquet --scheduler tcp://127.0.0.1:8786

    The first line of output is the scheduler's address.
    """  # noqa: D301
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())
    settings = {"host": host, "scheduler_port": port, "dashboard_address": f":{dashboard_port}"}
    with local_cluster(workers, threads, memory_limit, **settings) as cluster:
        click.echo(cluster.scheduler_address)
        click.echo(f"{len(cluster.workers)} workers, dashboard {cluster.dashboard_link}")
        over.wait()
