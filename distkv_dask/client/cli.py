"""``distkv``: the command line. Each command lives in a module of its own and is loaded when it is called."""

from __future__ import annotations

from importlib import import_module

import click

COMMANDS = {"simulate": "distkv_dask.simulate.command:simulate"}
"""Where each command is: module and name."""


class _Lazy(click.Group):
    """A group whose commands are imported on demand, so that none waits for the others' libraries."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, name = COMMANDS[cmd_name].split(":")
        command: click.Command = getattr(import_module(module), name)
        return command


@click.group(cls=_Lazy)
def main() -> None:
    """Distributed attention and a distributed KV cache on Dask."""
