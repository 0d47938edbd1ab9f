"""How commands fail: with one line on standard error that says what to do, and an exit status."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from distkv_dask.errors import DistKVError

FAILED = 1
"""Exit status when a command could not do what was asked."""

SOME_ROWS_FAILED = 3
"""Exit status of a batch that was done, but has rows with errors."""


@contextmanager
def clear_failures() -> Iterator[None]:
    """Turn our errors into a line on standard error and exit status 1."""
    try:
        yield
    except DistKVError as error:
        raise click.ClickException(str(error)) from error


def note(text: str) -> None:
    """Print progress for a user; prints nothing if standard error is piped."""
    if sys.stderr.isatty():
        click.echo(text, err=True)
