"""``distkv models check``: whether a model is served, and the longest sequence on a cluster, before an engine opens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import click
from dask.utils import format_bytes
from distributed.system import MEMORY_LIMIT

from distkv_dask.client.commands.engines import LIMIT, running_cluster
from distkv_dask.client.commands.failures import FAILED, clear_failures
from distkv_dask.client.commands.options import loading_options
from distkv_dask.config import Config
from distkv_dask.messages.names import KV_MEMORY_RESOURCE, MEMORY_RESOURCE, PAUSE_FRACTION
from distkv_dask.models.model_report import ModelReport, report_on
from distkv_dask.models.weight_sizes import kv_beside, shared_limit


@click.group("models")
def command() -> None:
    """Look at models before a cluster starts."""


@command.command("check")
@click.argument("model")
@loading_options
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    envvar="DASK_SCHEDULER_ADDRESS",
    help="Dask scheduler of a running cluster, to compute the longest sequence there.",
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    help="Print the memory limit with which this many workers, sharing the weights, use all memory of this machine.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(
    model: str,
    dtype: str,
    rope_scaling: dict[str, Any] | None,
    kv_memory: str | None,
    scheduler: str | None,
    workers: int | None,
    as_json: bool,
) -> None:
    """Say whether MODEL is served or why not, and how much memory it needs; exit status 1 if it is not served.

    MODEL is a directory, a GGUF file or a Hugging Face name. Its files are checked, but its weights are not read.
    """
    with clear_failures():
        report = report_on(model, dtype, rope_scaling)
        config = Config.load(kv_memory=kv_memory)
    said: dict[str, Any] = {"served": report.reason is None} | asdict(report)
    if scheduler is not None and report.reason is None:
        said |= room_on(_workers(scheduler), report, config)
    if workers is not None and report.weight_bytes is not None:
        said["memory_limit"] = shared_limit(report.weight_bytes, workers, MEMORY_LIMIT)
    click.echo(json.dumps(said, indent=1) if as_json else "\n".join(_lines(said)))
    if report.reason is not None:
        click.get_current_context().exit(FAILED)


def room_on(workers: Mapping[str, Mapping[str, Any]], report: ModelReport, config: Config) -> dict[str, Any]:
    """The longest sequence on the workers, in tokens, and the workers that are too small for the model.

    Parameters
    ----------
    workers
        Address -> information of Dask's scheduler about a worker.
    report
        The model.
    config
        Settings of the engine.
    """
    blocks, too_small, instances, windows = 0, {}, 0, 2 * (report.window_bytes or 0)
    block_bytes = (report.kv_bytes_per_token or 1) * config.block_tokens
    for address, worker in workers.items():
        limit, resources = int(worker["memory_limit"] or 0), worker.get("resources", {})
        holds_only = MEMORY_RESOURCE in resources
        weights = 0 if holds_only else report.weight_bytes or 0
        default = kv_beside(weights, limit) if config.kv_memory is None else config.kv_memory
        kv = int(resources.get(KV_MEMORY_RESOURCE, default))
        needed = kv + weights + int(worker["metrics"].get("memory", 0))
        if limit and needed > PAUSE_FRACTION * limit:
            too_small[address] = {"memory_limit": limit, "memory_limit_needed": int(needed / PAUSE_FRACTION)}
            continue
        instances += not holds_only
        blocks += max(0, kv - (0 if holds_only else windows)) // block_bytes
    room = blocks * config.block_tokens if instances else 0
    return {
        "workers": len(workers),
        "workers_too_small": too_small,
        "longest_context": min(room, report.window or room),
    }


def _workers(scheduler: str) -> dict[str, Any]:
    with running_cluster(scheduler) as client:
        identity = client.sync(client.scheduler.identity, n_workers=-1, callback_timeout=LIMIT)
    return dict(identity["workers"])


def _lines(said: Mapping[str, Any]) -> list[str]:
    kind = f" ({said['type']})" if said["type"] else ""
    if not said["served"]:
        return [f"{said['model']}{kind} is not served: {said['reason']}"]
    weights = "unknown until they are downloaded"
    if said["weight_bytes"] is not None:
        weights = f"{format_bytes(said['weight_bytes'])}, once for all workers of a machine"
    lines = [
        f"{said['model']}{kind} is served",
        f"weights: {weights}",
        f"KV cache: {format_bytes(said['kv_bytes_per_token'])} a token"
        + (f", and {format_bytes(said['window_bytes'])} of windows a sequence" if said["window_bytes"] else ""),
        f"longest sequence of the model: {said['window']:,} tokens",
    ]
    if "memory_limit" in said:
        lines.append(f"memory limit of each worker here: {format_bytes(said['memory_limit'])} (--memory-limit)")
    if "workers" in said:
        lines.append(
            f"longest sequence on this cluster of {said['workers']} workers: {said['longest_context']:,} tokens"
        )
        lines += (
            f"worker {address} is too small: memory_limit {format_bytes(one['memory_limit'])}, but it needs "
            f"{format_bytes(one['memory_limit_needed'])}; start fewer workers, or lower --kv-memory"
            for address, one in said["workers_too_small"].items()
        )
    return lines
