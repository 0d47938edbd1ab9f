"""``distkv bench``: how fast a cluster and a model are, in less than a minute."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import click

from distkv_dask.client.bench import SHORT, Decode, Prefill, decodes, prefills, room
from distkv_dask.client.bench_plot import plot as draw
from distkv_dask.client.commands.connect import chosen_of
from distkv_dask.client.commands.failures import clear_failures, note
from distkv_dask.client.commands.options import engine_option, model_options, scheduler_option, size_options
from distkv_dask.filesystems import check_file

Point = TypeVar("Point", Prefill, Decode)


@click.command("bench")
@click.option(
    "--prompt",
    "lengths",
    type=click.IntRange(1),
    multiple=True,
    default=(128, 512, 2048),
    show_default=True,
    help="Length of a prompt in tokens; may be repeated.",
)
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(1),
    multiple=True,
    default=(1, 4, 16),
    show_default=True,
    help="Requests decoded together; may be repeated.",
)
@click.option(
    "--new-tokens", type=click.IntRange(2), default=32, show_default=True, help="Length of each answer in tokens."
)
@click.option(
    "--seconds",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="Start no new measurement after this many seconds.",
)
@click.option("--plot", type=click.Path(path_type=Path), help="Write a chart to this file (SVG).")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures to this file (JSON).")
@model_options
@scheduler_option
@engine_option
@size_options
def command(
    lengths: tuple[int, ...],
    batches: tuple[int, ...],
    new_tokens: int,
    seconds: float,
    plot: Path | None,
    json_file: Path | None,
    **options: Any,
) -> None:
    """Measure a cluster and a model: first token and prefill by prompt length, decoding by batch size.

    \b
        distkv bench --model my-model --scheduler tcp://10.0.0.1:8786 --plot bench.svg

    Prompts are random tokens. Every point is measured once, after a warm-up. Repeat the command to see how much the
    figures vary. A decode rate counts all requests of the batch together.
    """  # noqa: D301
    model = options["model"]
    chosen = chosen_of(options)
    with clear_failures():
        for path in (plot, json_file):
            if path is not None:
                check_file(path)
    with chosen.engine(texts=False) as engine:
        facts = engine.facts
        kernels = {address: one.kernels for address, one in engine.status().workers.items()}
        title = f"{model}, {facts.dtype}, {facts.workers} workers"
        note(f"Measuring {title} ...")
        most = room(engine)
        prompts = [one for one in sorted(lengths) if one < min(most, facts.max_positions)]
        sizes = [one for one in sorted(batches) if one * (SHORT + new_tokens) <= most]
        until = perf_counter() + seconds
        filled = list(_while(prefills(engine, prompts), until))
        decoded = list(_while(decodes(engine, sizes, new_tokens), until))
    _show(title, filled, decoded)
    for text, count in Counter(kernels.values()).items():
        click.echo(f"Attention of {count} of {len(kernels)} workers: {text}")
    if large := len(lengths) + len(batches) - len(prompts) - len(sizes):
        click.echo(f"Left out: {large}, too long for the model, or for its KV memory of {most:,} tokens")
    if late := len(prompts) + len(sizes) - len(filled) - len(decoded):
        click.echo(f"Left out: {late}, since {seconds:g} s were over; --seconds gives more")
    if json_file is not None:
        found = {
            "version": version("distkv-dask"), "model": model, "dtype": facts.dtype, "workers": facts.workers,
            "kernels": kernels,
            "prefill": [asdict(one) for one in filled], "decode": [asdict(one) for one in decoded],
        }  # fmt: skip
        json_file.write_text(json.dumps(found, indent=1) + "\n")
    if plot is not None:
        plot.write_text(draw(title, filled, decoded))


def _while(points: Iterator[Point], until: float) -> Iterator[Point]:
    """Points until the time is up, but always the first."""
    for point in points:
        yield point
        if perf_counter() > until:
            return


def _show(title: str, filled: list[Prefill], decoded: list[Decode]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    prefill = Table(title=escape(title), title_justify="left")
    for column in ("prompt", "workers with KV", "first token", "prefill"):
        prefill.add_column(column, justify="right")
    for one in filled:
        cells = f"{one.prompt_tokens:,} tokens", str(one.workers), f"{one.first_token_seconds:.2f} s"
        prefill.add_row(*cells, f"{one.tokens_per_second:,.0f} tokens/s")
    decode = Table()
    for column in ("batch", "decode, all together", "a token of each"):
        decode.add_column(column, justify="right")
    for two in decoded:
        decode.add_row(f"{two.batch:,}", f"{two.tokens_per_second:,.1f} tokens/s", f"{1000 * two.token_seconds:.0f} ms")
    Console().print(prefill, decode)
