"""What commands ask of the engines of a running cluster, whoever opened them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from distkv_dask.client.commands.connect import client_of, failing_clearly
from distkv_dask.protocol import ClientCall

LIMIT = 30.0
"""Seconds that a scheduler may take to answer."""


@contextmanager
def running(scheduler: str) -> Iterator[Any]:
    """A Dask client of a running cluster; one that stops answering is an error on one line."""
    with failing_clearly(), client_of(scheduler) as client:
        try:
            yield client
        except (TimeoutError, OSError) as error:
            raise click.ClickException(
                f"the Dask scheduler at {scheduler} does not answer any more: {error}"
            ) from error


def engines_of(client: Any) -> dict[str, dict[str, Any]]:
    """Status by engine; none where no engine was ever opened."""
    return client.sync(_engines, client, callback_timeout=LIMIT) or {}


async def _engines(client: Any) -> Any:
    return await getattr(client.scheduler, ClientCall.ENGINES)()
