"""What commands share: the options that choose cluster, model and sampling, and the engine that comes of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from distkv_dask.client.engine import Engine
from distkv_dask.errors import DistKVError
from distkv_dask.rope_scaling import checked
from distkv_dask.types import SamplingParams

Command = TypeVar("Command", bound=Callable[..., Any])

FAILED = 1
"""Exit status when a command could not do what was asked."""

SOME_ROWS_FAILED = 3
"""Exit status of a batch that was done, but has rows with errors."""


def scheduler_option(command: Command) -> Command:
    """Add ``--scheduler`` to a command that starts a cluster without it."""
    return click.option(
        "--scheduler",
        metavar="ADDRESS",
        envvar="DASK_SCHEDULER_ADDRESS",
        help="Dask scheduler of a running cluster, such as tcp://10.0.0.1:8786. Without it, a cluster is "
        "started on this machine.",
    )(command)


def running_option(command: Command) -> Command:
    """Add ``--scheduler`` to a command that looks at a running cluster."""
    return click.option(
        "--scheduler",
        metavar="ADDRESS",
        envvar="DASK_SCHEDULER_ADDRESS",
        required=True,
        help="Dask scheduler of the cluster, such as tcp://10.0.0.1:8786; or set DASK_SCHEDULER_ADDRESS.",
    )(command)


def engine_option(command: Command) -> Command:
    """Add ``--engine`` to a command that opens one without it."""
    return click.option(
        "--engine",
        metavar="ID",
        help="Ask an engine that is open on the cluster already, with the model that it has: its id, which distkv "
        "status shows, or auto where there is only one.",
    )(command)


def size_options(command: Command) -> Command:
    """Add the options that size a cluster on this machine."""
    for option in (
        click.option("--memory-limit", metavar="BYTES", help="Memory of each worker, such as '8 GiB'."),
        click.option("--threads", type=click.IntRange(1), help="Compute threads of each worker."),
        click.option(
            "--workers", type=click.IntRange(1), help="Worker processes; all three suit the machine if not given."
        ),
    ):
        command = option(command)
    return command


def sampling_options(command: Command) -> Command:
    """Add the options that say how answers are drawn."""
    for option in (
        click.option("--stop", multiple=True, metavar="TEXT", help="Text at which an answer ends; may be repeated."),
        click.option("--seed", type=int, help="Makes draws repeatable."),
        click.option(
            "--top-p", type=float, default=1.0, show_default=True, help="Draw from the most likely tokens only."
        ),
        click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token."),
        click.option("--max-new-tokens", type=int, default=128, show_default=True, help="Longest answer, in tokens."),
    ):
        command = option(command)
    return command


def model_options(command: Command) -> Command:
    """Add the options that say which model it is, and how much memory its KV cache has."""
    for option in (
        click.option(
            "--kv-memory",
            metavar="BYTES",
            help="KV cache of each worker, such as '4 GiB'; half its memory if not given.",
        ),
        click.option(
            "--rope-scaling",
            metavar="KIND:FACTOR",
            callback=_rope_scaling,
            help="Sequences longer than the model was made for: yarn:4 or linear:2, for example.",
        ),
        click.option("--dtype", default="auto", show_default=True, help="auto, bfloat16, float16 or float32."),
        click.option(
            "--model", default="smollm2-135m", show_default=True, help="Directory, GGUF file or Hugging Face name."
        ),
    ):
        command = option(command)
    return command


def _rope_scaling(_: click.Context, __: click.Parameter, text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    kind, _colon, factor = text.partition(":")
    try:
        return checked({"rope_type": kind, "factor": float(factor)})
    except (ValueError, DistKVError) as error:
        raise click.BadParameter(f"{text!r} is not like yarn:4 ({error})") from error


def local_cluster(workers: int | None, threads: int | None, memory_limit: str | None, **settings: Any) -> Any:
    """Return a Dask cluster of this machine's processes, sized as Dask sizes them where nothing else is said."""
    from distributed import LocalCluster

    sizes = {"n_workers": workers, "threads_per_worker": threads, "memory_limit": memory_limit}
    return LocalCluster(**{name: value for name, value in sizes.items() if value is not None}, **settings)


@contextmanager
def client_of(
    scheduler: str | None, workers: int | None = None, threads: int | None = None, memory_limit: str | None = None
) -> Iterator[Any]:
    """Connect to a scheduler, or start a cluster for the time being."""
    from distributed import Client

    with ExitStack() as stack:
        if scheduler is None:
            cluster = stack.enter_context(local_cluster(workers, threads, memory_limit, dashboard_address=":0"))
            note(f"Cluster on this machine: {len(cluster.workers)} workers, dashboard {cluster.dashboard_link}")
            yield stack.enter_context(Client(cluster))
            return
        if workers or threads or memory_limit:
            raise click.UsageError("--workers, --threads and --memory-limit are for a cluster that is started here")
        try:
            client = stack.enter_context(Client(scheduler, timeout="30s"))
        except (OSError, ValueError) as error:
            raise click.ClickException(f"no Dask scheduler answers at {scheduler}: {error}") from error
        yield client


def sampling_of(options: dict[str, Any]) -> SamplingParams:
    """What a command's options say about sampling; takes them out of ``options``."""
    names = ("max_new_tokens", "temperature", "top_p", "seed", "stop")
    with failing_clearly():
        return SamplingParams(**{name: options.pop(name) for name in names})


@contextmanager
def engine_of(options: dict[str, Any]) -> Iterator[Engine]:
    """Open the engine that a command's options ask for; takes these options out of ``options``."""
    with failing_clearly():
        cluster = {name: options.pop(name) for name in ("scheduler", "workers", "threads", "memory_limit")}
        model = {name: options.pop(name) for name in ("model", "dtype", "kv_memory", "rope_scaling")}
        attached: str | None = options.pop("engine")
        if attached is not None:
            _check_attached(cluster["scheduler"], model)
        with client_of(**cluster) as client:
            if attached is not None:
                with Engine.attach(None if attached == "auto" else attached, client) as engine:
                    yield engine
                return
            note(f"Loading {model['model']} on every worker ...")
            with Engine(client, **model) as engine:
                yield engine


def _check_attached(scheduler: str | None, model: Iterable[str]) -> None:
    if scheduler is None:
        raise click.UsageError("--engine is one of a running cluster: name its --scheduler")
    source = click.get_current_context().get_parameter_source
    if given := [name for name in model if source(name) is ParameterSource.COMMANDLINE]:
        option = given[0].replace("_", "-")
        raise click.UsageError(f"--{option} is for an engine that is opened here: one that is open already has its own")


@contextmanager
def failing_clearly() -> Iterator[None]:
    """Turn our errors into a line on standard error and exit status 1."""
    try:
        yield
    except DistKVError as error:
        raise click.ClickException(str(error)) from error


def note(text: str) -> None:
    """Tell somebody who watches what is going on; nothing where standard error is piped."""
    if sys.stderr.isatty():
        click.echo(text, err=True)
