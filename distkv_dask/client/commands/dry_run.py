"""``distkv run --dry-run``: what a batch will take, as a table or as JSON."""

from __future__ import annotations

import json

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distkv_dask.client.batch.estimate import Estimate, estimate_alone, estimate_batch
from distkv_dask.client.batch.needs import Counting
from distkv_dask.client.batch.openai_format import OpenAIBatchSource
from distkv_dask.client.batch.pace import Means
from distkv_dask.client.batch.rows import Source
from distkv_dask.client.batch.spec import BatchSpec
from distkv_dask.client.commands.connect import Chosen, check_model
from distkv_dask.client.commands.failures import clear_failures
from distkv_dask.config import Config
from distkv_dask.messages.status import WorkerPerformance
from distkv_dask.models.model_report import report_on
from distkv_dask.scheduler.costs.presets import PRESETS

HOUR, MINUTE = 3600, 60


def dry_run(chosen: Chosen, source: Source, spec: BatchSpec, preset: str | None, as_json: bool) -> Estimate:
    """Estimate a batch and print it: on the cluster that was chosen, or without one from a preset."""
    if preset is not None:
        with clear_failures():
            found = _from_preset(chosen, source, spec, preset)
    else:
        with chosen.session(texts=not isinstance(source, OpenAIBatchSource)) as session, clear_failures():
            found = estimate_batch(session, source, spec)
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=1))
    else:
        _show(found)
    return found


def _from_preset(chosen: Chosen, source: Source, spec: BatchSpec, name: str) -> Estimate:
    """Estimate without a cluster, for ``--workers`` workers of the preset."""
    if chosen.source is None:
        raise click.UsageError("--preset is for an estimate without a cluster: leave out --engine")
    check_model(chosen.source, texts=True)
    config, preset = Config.load(), PRESETS[name]
    text = chosen.source.config().get_text_config()
    window = report_on(chosen.source.name, chosen.model["dtype"], chosen.model["rope_scaling"]).window
    rope = chosen.source.rope_scaling
    how = Counting(
        chosen.source.name, None if rope is None else tuple(sorted(rope.items())), text.vocab_size,
        float("inf") if window is None else window, config.block_tokens,
    )  # fmt: skip
    curve, workers = preset.model.curve, chosen.sizes["workers"] or 1
    speed = WorkerPerformance(curve.step, curve.row, curve.token, curve.prompt, curve.pair, measured=False, slower=1.0)
    exchange = preset.model.exchange(preset.model.inside, 1)
    means = Means((speed,) * workers, preset.kv_tokens * workers, config.window_batch, exchange, f"the preset {name}")
    return estimate_alone(source, spec, how, means)


def _show(found: Estimate) -> None:
    table = Table(title="Dry run: nothing was answered", title_justify="left", show_header=False)
    for cells in (
        ("rows", f"{found.rows:,}"),
        ("requests", f"{found.requests:,}"),
        ("questions that share a document", f"{found.sharing:,}"),
        ("tokens of prompts", f"{found.prompt_tokens:,}"),
        ("of them computed once for several", f"{found.shared_tokens:,}"),
        ("tokens of answers", f"at most {found.new_tokens:,}"),
        ("largest request, tokens of KV", f"{found.largest_tokens:,}"),
        ("room for tokens of KV", f"{found.kv_tokens:,} on {found.workers} workers"),
        ("prefill, all workers together", duration(found.prefill_seconds)),
        ("decode, all workers together", f"at most {duration(found.decode_seconds)}"),
        ("time", f"at most {duration(found.seconds)}"),
        ("speed by", found.basis),
        ("will be refused", f"{found.refused:,}"),
    ):
        table.add_row(*map(escape, cells))
    console = Console()
    console.print(table)
    if found.refused_rows:
        refused = Table("row", "question", "why", title="Will be refused", title_justify="left")
        for one in found.refused_rows:
            refused.add_row(escape(str(one.label)), escape(one.question or ""), escape(one.error))
        console.print(refused)
    if found.refused > len(found.refused_rows):
        console.print(f"... and {found.refused - len(found.refused_rows):,} more")


def duration(seconds: float) -> str:
    """A time for people.

    Examples
    --------
    >>> duration(12.3), duration(75), duration(8000)
    ('12.3 s', '1 min 15 s', '2 h 13 min')
    """
    if seconds < MINUTE:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < HOUR:
        return f"{whole // MINUTE} min {whole % MINUTE} s"
    return f"{whole // HOUR} h {whole % HOUR // MINUTE} min"
