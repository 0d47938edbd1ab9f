"""``distkv serve``: a model behind OpenAI's HTTP API."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING, Any

import click
from dask.utils import parse_bytes

from distkv_dask.client.batch.openai_format import DEFAULTS
from distkv_dask.client.batch.output import locked
from distkv_dask.client.commands.connect import chosen_of
from distkv_dask.client.commands.failures import clear_failures
from distkv_dask.client.commands.options import engine_option, model_options, scheduler_option, size_options
from distkv_dask.client.listener import listener_at
from distkv_dask.client.session.session import Session
from distkv_dask.errors import ConfigError, MissingProgramError
from distkv_dask.models.adapter_files import read_adapter

if TYPE_CHECKING:
    from distkv_dask.client.serve.keys import Keys

PACKAGES = ("starlette", "uvicorn", "python_multipart", "prometheus_client")


def _bytes(_: click.Context, __: click.Parameter, text: str) -> int:
    try:
        size = int(parse_bytes(text))
    except (ValueError, OverflowError) as error:
        raise click.BadParameter(f"{text!r} is not an amount of bytes such as '32 MiB' ({error})") from error
    if size < 1:
        raise click.BadParameter(f"{text!r} is not above 0")
    return size


def _adapters(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for one in given:
        name, equals, place = one.partition("=")
        if not equals or not name or not place:
            raise click.BadParameter(f"{one!r} is not a name and a folder, such as contracts=adapters/contracts")
        if name in found:
            raise click.BadParameter(f"the name {name!r} is given twice")
        with clear_failures():
            found[name] = read_adapter(place).path
    return found


@click.command("serve")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; addresses that other machines reach need keys.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes any free port.")
@click.option(
    "--api-keys",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="File of API keys, one a line. The variable DISTKV_API_KEYS may hold some, too.",
)
@click.option("--model-name", help="Another name by which clients may call the model.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=FOLDER",
    callback=_adapters,
    help="LoRA adapter, as peft saves it, and the model's name with which clients ask for it; may be repeated.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Longest answer if a request sets no limit.",
)
@click.option(
    "--max-open",
    type=click.IntRange(1),
    help="Most requests at once; more are answered with 429. By default twice what all workers can decode together.",
)
@click.option(
    "--max-body", metavar="BYTES", callback=_bytes, default="32 MiB", show_default=True, help="Largest request."
)
@click.option(
    "--drain",
    type=click.FloatRange(0, 3600),
    metavar="SECONDS",
    default=30.0,
    show_default=True,
    help="Time for open requests to end when the server is stopped.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for uploaded files and batches, for later servers, too. By default they end with the server.",
)
@model_options
@scheduler_option
@engine_option
@size_options
def command(host: str, port: int, api_keys: Path | None, data: Path | None, **options: Any) -> None:
    """Answer OpenAI's clients: chats, completions, files and batches, until Ctrl-C or SIGTERM.

    \b
        distkv serve --model my-model --scheduler tcp://10.0.0.1:8786 --api-keys keys.txt --host 0.0.0.0

    The first line of output is the address for clients (base_url).
    """  # noqa: D301
    with clear_failures():
        if missing := [name for name in PACKAGES if find_spec(name) is None]:
            raise MissingProgramError(f"distkv serve needs {missing[0]}: pip install 'distkv-dask[serve]'")
        from distkv_dask.client.serve.gate import LOCAL
        from distkv_dask.client.serve.keys import read_keys

        keys = read_keys(api_keys)
        if not keys and host not in LOCAL:
            raise ConfigError(
                f"{host} can be reached by others, and everybody could ask the model: give --api-keys FILE, or set "
                f"DISTKV_API_KEYS"
            )
    names = ("model_name", "adapters", "max_new_tokens", "max_open", "max_body", "drain")
    how = {name: options.pop(name) for name in names}
    chosen = chosen_of(options)
    with ExitStack() as stack:
        with clear_failures():
            listener = stack.enter_context(listener_at(host, port))
        folder = data or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="distkv-serve-")))
        session = stack.enter_context(chosen.session())
        with clear_failures():
            _serve(session, keys, folder, listener, how)


def _serve(session: Session, keys: Keys, folder: Path, listener: socket, how: Mapping[str, Any]) -> None:
    from distkv_dask.client.serve.app import gate_of
    from distkv_dask.client.serve.gate import Limits
    from distkv_dask.client.serve.server import Server
    from distkv_dask.client.serve.serving import Serving

    open_requests = how["max_open"] or 2 * session.config.window_batch * session.facts.workers
    limits = Limits(how["max_body"], open_requests, how["drain"])
    model = session.model.name
    names = [name for name in (how["model_name"], model, Path(model).name) if name]
    adapters = how["adapters"]
    for name, place in adapters.items():
        if name in names:
            raise ConfigError(f"--adapter {name}={place}: {name!r} is the model itself, choose another name")
        session.try_adapter(place)
    sampling = replace(DEFAULTS, max_new_tokens=how["max_new_tokens"])
    serving = Serving(session, names, sampling, limits, adapters)
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    with locked(folder):
        Server(gate_of(serving, keys, folder), serving, listener).run(lambda: click.echo(address))
