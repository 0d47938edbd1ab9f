"""From a command's options to an engine: options are checked before a cluster is started or contacted."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import click

from distkv_dask.client.commands.failures import clear_failures, note
from distkv_dask.client.commands.options import was_given
from distkv_dask.client.engine import Engine
from distkv_dask.client.session.attached_engine import AttachedEngine
from distkv_dask.client.session.owned_engine import OwnedEngine
from distkv_dask.client.session.session import Session
from distkv_dask.config import Config
from distkv_dask.errors import ClusterError, ModelError
from distkv_dask.models.source import ModelSource, resolve_model
from distkv_dask.models.support import check_supported
from distkv_dask.models.weight_sizes import shared_limit

SIZES = ("workers", "threads", "memory_limit")
MODEL = ("model", "dtype", "kv_memory", "rope_scaling")
"""Options of a cluster on this machine, and of an engine that is opened here."""


@contextmanager
def local_cluster(
    workers: int | None,
    threads: int | None,
    memory_limit: str | int | None,
    weights: int | None = None,
    **settings: Any,
) -> Iterator[Any]:
    """A Dask cluster on this machine, by default sized by Dask; with GPUs, one worker for each.

    ``weights`` are bytes that the workers share.
    """
    from distributed import LocalCluster
    from distributed.system import MEMORY_LIMIT

    if workers is not None and memory_limit is None and weights is not None:
        memory_limit = shared_limit(weights, workers, MEMORY_LIMIT)
    sizes = {"n_workers": workers, "threads_per_worker": threads, "memory_limit": memory_limit}
    try:
        kind = _kind_of_cluster()
        if kind is LocalCluster and workers is None and _sees_cards():
            sizes["n_workers"] = 1  # they would share a card
        cluster = kind(**{name: one for name, one in sizes.items() if one is not None}, **settings)
    except (OSError, RuntimeError, ValueError) as error:
        raise click.ClickException(
            f"no cluster could be started on this machine: {error.__cause__ or error}"
        ) from error
    try:
        yield cluster
    finally:
        try:
            cluster.close()
        except TimeoutError:  # Dask kills a worker that ends too slowly, and does not wait for the kill
            note("A worker took too long to end, and was killed.")


def _kind_of_cluster() -> Callable[..., Any]:
    """The cluster class for this machine: with GPUs dask-cuda's, which gives each worker its own."""
    from distributed import LocalCluster

    if not _sees_cards():
        return LocalCluster
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError as error:
        note(f"This machine has a GPU, but dask-cuda cannot be used ({error}): pip install 'distkv-dask[gpu]'")
        return LocalCluster
    return cast("Callable[..., Any]", LocalCUDACluster)


def _sees_cards() -> bool:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "any").strip() not in ("", "-1") and _cards() > 0


def _cards() -> int:
    """Number of the machine's GPUs, counted by Dask's diagnostics."""
    from distributed.diagnostics.nvml import device_get_count

    return int(device_get_count())


@contextmanager
def client_of(scheduler: str | None, **sizes: Any) -> Iterator[Any]:
    """Connect to a scheduler, or start a cluster for the duration of the command."""
    from distributed import Client

    with ExitStack() as stack:
        if scheduler is None:
            cluster = stack.enter_context(local_cluster(**sizes, dashboard_address=":0"))
            note(f"Cluster on this machine: {len(cluster.workers)} workers, dashboard {cluster.dashboard_link}")
            yield stack.enter_context(Client(cluster))
            return
        try:
            client = stack.enter_context(Client(scheduler, timeout="30s"))
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise click.ClickException(f"no Dask scheduler answers at {scheduler}: {error}") from error
        yield client


@dataclass(frozen=True, slots=True)
class Chosen:
    """The cluster and the model of a command's options, checked as far as possible without loading them."""

    scheduler: str | None
    sizes: dict[str, Any]
    model: dict[str, Any]
    attached: str | None
    source: ModelSource | None

    @contextmanager
    def engine(self, texts: bool = True) -> Iterator[Engine]:
        """Open the engine, after checking the model; with ``texts``, the model needs a tokenizer."""
        with self._client(texts) as client:
            attached, model = self.attached, self.model
            with Engine(client, **model) if attached is None else Engine.attach(_id(attached), client) as engine:
                yield engine

    @contextmanager
    def session(self, texts: bool = True) -> Iterator[Session]:
        """As :meth:`engine`, for batches."""
        with self._client(texts) as client:
            engine = OwnedEngine.of(**self.model) if self.attached is None else AttachedEngine(_id(self.attached) or "")
            with closing(Session(client, engine)) as session:
                yield session

    @contextmanager
    def _client(self, texts: bool) -> Iterator[Any]:
        with clear_failures():
            weights = None
            if self.source is not None:
                check_model(self.source, texts)
                if self.scheduler is None:
                    weights = weights_of(self.source, self.model["dtype"])
            with client_of(self.scheduler, **self.sizes, weights=weights) as client:
                if self.attached is None:
                    note(f"Loading {self.model['model']} on every worker ...")
                yield client


def _id(attached: str) -> str | None:
    return None if attached == "auto" else attached


def chosen_of(options: dict[str, Any]) -> Chosen:
    """Read the options that choose cluster and model, and check them; takes them out of ``options``."""
    scheduler, attached = options.pop("scheduler"), options.pop("engine")
    sizes, model = ({name: options.pop(name) for name in names} for names in (SIZES, MODEL))
    if scheduler is not None and any(sizes.values()):
        raise click.UsageError(
            "--workers, --threads and --memory-limit are for a cluster that the command starts: leave them out with "
            "--scheduler"
        )
    if attached is not None:
        _check_attached(scheduler, attached)
    with clear_failures():
        check_cluster(scheduler)
        source = resolve_model(model["model"], model["rope_scaling"]) if attached is None else None
    return Chosen(scheduler, sizes, model, attached, source)


def check_cluster(scheduler: str | None) -> None:
    """Check a scheduler's address (None: a cluster is started here), certificates and settings.

    Raises
    ------
    ClusterError, ConfigError
        When one of them is wrong.
    """
    Config.load()
    if scheduler is not None:
        _check_address(scheduler)
    from distributed import Security

    try:
        security = Security()
        roles = ("client",) if scheduler is not None else ("client", "scheduler", "worker")
        secured = [security.get_connection_args(role) for role in roles]
    except (OSError, ssl.SSLError, ValueError, TypeError) as error:
        raise ClusterError(f"the certificates that distributed.comm.tls names cannot be used: {error}") from error
    if scheduler is not None and scheduler.startswith("tls://") and secured[0].get("ssl_context") is None:
        raise ClusterError(f"{scheduler} needs certificates: set distributed.comm.tls in Dask's configuration")


def check_model(source: ModelSource, texts: bool) -> None:
    """Check that a model can be served and has a tokenizer.

    Raises
    ------
    ModelError, ConfigError
        When one of these is not true.
    """
    check_supported(source.config())
    if texts and source.tokenizer() is None:
        raise ModelError(
            f"model {source.name!r} has no tokenizer, so it cannot read texts: choose a folder that has tokenizer files"
        )


def weights_of(source: ModelSource, dtype: str) -> int | None:
    """Bytes of a model's weights, which workers on this machine will share; None if its files are not here yet."""
    return source.weight_bytes(source.config(), dtype)


def _check_address(scheduler: str) -> None:
    from distributed.comm.addressing import parse_address, parse_host_port
    from distributed.comm.registry import get_backend

    try:
        scheme, where = parse_address(scheduler)
        get_backend(scheme)
        if scheme == "inproc":  # of this process
            return
        host, port = parse_host_port(where)
        if not host or not 0 < port < 65536:
            raise ValueError("it needs a host and a port from 1 to 65535")
    except ValueError as error:
        raise ClusterError(f"{scheduler!r} is not a scheduler address such as tcp://10.0.0.1:8786: {error}") from error


def _check_attached(scheduler: str | None, attached: str) -> None:
    if scheduler is None:
        raise click.UsageError("--engine names an engine of a running cluster: give its --scheduler, too")
    if not attached.isalnum():
        raise click.UsageError(f"--engine is {attached!r}, but should be an id that distkv status shows, or auto")
    if given := [name for name in MODEL if was_given(name)]:
        option = given[0].replace("_", "-")
        raise click.UsageError(
            f"--{option} is for an engine that the command opens, but --engine names an open one: leave out one of them"
        )
