"""The command line: ``distkv ...``, and ``dask distkv ...`` through Dask's own; commands are imported when used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

COMMANDS = {
    "run": ("distkv_dask.client.commands.run:command", "Ask about every row of a table or file of a folder."),
    "ask": ("distkv_dask.client.commands.ask:command", "Ask one question, about a document or none."),
    "ingest": ("distkv_dask.client.commands.ingest:command", "Save a document's KV cache, to ask about it later."),
    "serve": ("distkv_dask.client.commands.serve:command", "Answer OpenAI's clients over HTTP."),
    "status": ("distkv_dask.client.commands.status:command", "Show what a cluster is doing."),
    "documents": ("distkv_dask.client.commands.documents:command", "List the documents that a cluster keeps."),
    "models": ("distkv_dask.client.commands.models:command", "Check if a model is served, and the memory it needs."),
    "bench": ("distkv_dask.client.commands.bench:command", "Measure a cluster and a model, in a minute."),
    "cluster": ("distkv_dask.client.commands.cluster:command", "Start a Dask cluster on this machine."),
    "simulate": ("distkv_dask.simulate.command:simulate", "Try policies on a simulated cluster."),
}
"""Name of a command -> where it is (module and name), and its line in the list."""


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports one when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in the order in which a newcomer needs them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import a command."""
        if name not in COMMANDS:
            return None
        module, attribute = COMMANDS[name][0].split(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(
    "distkv", cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="distkv-dask")
def main(**_: Any) -> None:
    """Ask a language model on a Dask cluster about documents too long for one machine.

    Without --scheduler, run, ask, ingest, serve and bench start a cluster on this machine and stop it when they end.
    """


if __name__ == "__main__":
    main(prog_name="distkv")
