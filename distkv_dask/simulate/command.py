"""``distkv simulate``: policies on a trace, without a cluster."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
from click.core import ParameterSource

from distkv_dask.errors import DistKVError
from distkv_dask.filesystems import check_file
from distkv_dask.scheduler.costs.presets import LINKS, PRESETS
from distkv_dask.scheduler.policies import POLICIES
from distkv_dask.simulate.cluster import Simulation
from distkv_dask.simulate.islands import between_islands
from distkv_dask.simulate.outcome import Outcome
from distkv_dask.simulate.plots import plot as draw
from distkv_dask.simulate.report import figures
from distkv_dask.simulate.traces import read_trace
from distkv_dask.simulate.workloads import WORKLOADS, workload_named


def _positive(_: click.Context, __: click.Parameter, value: float | None) -> float | None:
    if value is not None and not 0 < value < math.inf:
        raise click.BadParameter(f"{value} is not a number above 0")
    return value


def _losses(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> list[tuple[float, int]]:
    try:
        losses = [(float(time), int(worker)) for time, worker in (value.split(":") for value in values)]
    except ValueError as error:
        raise click.BadParameter("write TIME:WORKER, as in 30:5") from error
    if not all(0 <= time < math.inf for time, _ in losses):
        raise click.BadParameter("workers are lost at 0 seconds or later")
    return losses


@click.command()
@click.option("--trace", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Requests: .csv or .jsonl.")
@click.option("--workload", help=f"Generated requests: {', '.join(WORKLOADS)}.")
@click.option(
    "--workers", default=32, show_default=True, type=click.IntRange(1), help="Number of workers in the cluster."
)
@click.option(
    "--policy", "names", multiple=True, type=click.Choice(list(POLICIES)), help="Placement policy; may be repeated."
)
@click.option("--preset", default="a100-7b", show_default=True, type=click.Choice(list(PRESETS)))
@click.option("--link", type=click.Choice(list(LINKS)), help="Link between hosts, instead of the preset's.")
@click.option("--islands", type=click.IntRange(2), help="Groups of hosts with slow links between them.")
@click.option(
    "--island-link", type=click.Choice(list(LINKS)), help="Link between hosts of different islands; 1gbe by default."
)
@click.option("--requests", type=click.IntRange(1), help="Number of requests (the first ones of a trace).")
@click.option(
    "--rate", type=float, callback=_positive, help="Requests per second of a workload; by default all come at once."
)
@click.option(
    "--speedup",
    default=1.0,
    show_default=True,
    callback=_positive,
    help="Factor by which a trace's requests come faster.",
)
@click.option("--no-prefill", is_flag=True, help="Prompts come with their KV, computed elsewhere.")
@click.option(
    "--lose",
    "losses",
    multiple=True,
    callback=_losses,
    metavar="TIME:WORKER",
    help="Lose a worker (numbered from 0) at this time in seconds; may be repeated.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path),
    help="Write the figures (JSON, a list for several policies).",
)
@click.option("--plot", type=click.Path(path_type=Path), help="Write a chart (SVG).")
@click.pass_context
def simulate(
    context: click.Context,
    trace: Path | None,
    workload: str | None,
    workers: int,
    names: tuple[str, ...],
    preset: str,
    link: str | None,
    islands: int | None,
    island_link: str | None,
    requests: int | None,
    rate: float | None,
    speedup: float,
    no_prefill: bool,
    losses: list[tuple[float, int]],
    seed: int,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """Simulate policies on modelled workers, driven by the state machine that runs an engine."""
    _check_given(context)
    chosen = PRESETS[preset]
    if link is not None:
        chosen = replace(chosen, model=replace(chosen.model, between=LINKS[link]))
    if islands is not None:
        apart = between_islands(chosen, workers, islands, LINKS[island_link or "1gbe"])
        chosen = replace(chosen, model=replace(chosen.model, links=apart))
    try:
        for path in (json_file, plot):
            if path is not None:
                check_file(path)
        arrivals = (
            read_trace(trace, speedup, requests)
            if trace is not None
            else workload_named(workload or "").generate(requests, rate, seed)
        )
        outcomes = [
            Simulation(chosen, workers, name, prefill=not no_prefill).run(arrivals, losses)
            for name in names or ("overflow",)
        ]
    except DistKVError as error:
        raise click.ClickException(str(error)) from error
    _show(outcomes, json_file, plot)


def _check_given(context: click.Context) -> None:
    """Refuse options that cannot be combined."""
    if (context.params["trace"] is None) == (context.params["workload"] is None):
        raise click.UsageError("give either --trace or --workload")
    needs = (("rate", "workload"), ("seed", "workload"), ("speedup", "trace"), ("island_link", "islands"))
    for name, of in needs:
        given = context.get_parameter_source(name) is not ParameterSource.DEFAULT
        if given and context.params[of] is None:
            raise click.UsageError(f"--{name.replace('_', '-')} is for --{of}: leave it out")


def _show(outcomes: Sequence[Outcome], json_file: Path | None, plot: Path | None) -> None:
    """Print a line for each policy, and write the requested files."""
    found = [figures(outcome) for outcome in outcomes]
    for one in found:
        click.echo(
            f"{one['policy']:11} {one['throughput_tps']:9.1f} tokens/s  {one['finished']} finished  "
            f"{one['refused']} refused  longest {one['longest_context_tokens']:,}  moved {one['moved_blocks']} blocks"
        )
    if json_file is not None:
        json_file.write_text(json.dumps(found[0] if len(found) == 1 else found, indent=1) + "\n")
    if plot is not None:
        plot.write_text(draw(outcomes))
