"""Requests of commands to a running cluster and its engines, also to those that others opened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from distkv_dask.client.commands.connect import check_cluster, client_of
from distkv_dask.client.commands.failures import clear_failures
from distkv_dask.messages.client_calls import ClientCall
from distkv_dask.messages.names import PLUGIN, unpack
from distkv_dask.messages.status import EngineSummary
from distkv_dask.version import VERSION

LIMIT = 10.0
"""Seconds that a scheduler may take to answer."""

Engines = dict[str, EngineSummary]


@contextmanager
def running_cluster(scheduler: str) -> Iterator[Any]:
    """A Dask client of a running cluster; if the cluster stops answering, the error is one line."""
    with clear_failures():
        check_cluster(scheduler)
    with clear_failures(), client_of(scheduler) as client:
        try:
            yield client
        except OSError as error:
            raise click.ClickException(f"the Dask scheduler at {scheduler} is silent: {error}") from error


def engines_of(client: Any) -> tuple[int, Engines]:
    """Number of workers, and engines by id (none if no engine was ever opened).

    Raises
    ------
    OSError
        The scheduler does not answer in time.
    ClusterError
        It runs another version of the package.
    """
    found: tuple[int, Engines] = client.sync(_look, client, callback_timeout=LIMIT)
    return found


async def _look(client: Any) -> tuple[int, Engines]:
    if client.scheduler is None:
        raise OSError("the connection is closed")
    identity = await client.scheduler.identity(n_workers=-1)
    if not await client.get_metadata([PLUGIN], default=False):
        return len(identity["workers"]), {}
    engines = await getattr(client.scheduler, ClientCall.ENGINES)(version=VERSION)
    return len(identity["workers"]), unpack(engines)
