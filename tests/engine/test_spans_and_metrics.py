"""Dask's own pages show the engine: its tasks are in spans, and report how their time was spent."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
from distributed import Client, Scheduler, Worker, span

from distkv_dask import Engine, SamplingParams
from tests._cluster import engine_test
from tests._models import prompt_ids, text_model_dir

TINY: dict[str, Any] = {"dtype": "float32", "kv_memory": "512 KiB", "block_tokens": 8, "prefill_chunk_tokens": 32}


def tasks_by_span(scheduler: Scheduler) -> dict[tuple[str, ...], set[str]]:
    """Kinds of tasks in every span."""
    spans = scheduler.extensions["spans"].spans.values()
    return {one.name: {group.prefix.name for group in one.groups} for one in spans if one.groups}


@engine_test(2)
async def test_tasks_are_in_the_engines_span_and_those_of_a_batch_in_its_own(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    few = SamplingParams(max_new_tokens=4, ignore_eos=True)
    with span("my work"):
        opening = Engine(client, str(text_model_dir()), **TINY)
    async with opening as engine:
        await engine.submit(prompt_ids(200), few)  # is on both workers
        alone = tasks_by_span(scheduler)
        (name,) = (one for one in alone if one[:2] == ("my work", "distkv"))
        assert name[2] == f"text {engine.id}"
        assert {kind.partition("-")[0] for kind in alone[name]} >= {"prefill", "decode", "attend"}
        out = Path(workers[0].local_directory) / "answers"
        await engine.process(pa.table({"text": ["one", "two"]}), out=out, sampling=few)
        batch = tasks_by_span(scheduler)["distkv", "batch answers"]
        assert {kind.partition("-")[0] for kind in batch} >= {"prefill", "decode"}


def told_by(workers: tuple[Worker, ...]) -> defaultdict[str, float]:
    """Seconds and bytes that tasks reported to Dask, by label."""
    told: defaultdict[str, float] = defaultdict(float)
    for worker in workers:
        for key, value in worker.digests_total.items():
            if key[0] == "execute" and str(key[-2]).startswith("distkv"):
                told[key[-2]] += value
                assert key[-1] == ("bytes" if key[-2] in ("distkv queries", "distkv partials") else "seconds")
    return told


@engine_test(2)
async def test_tasks_tell_dask_where_their_time_went(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
    async with Engine(client, str(text_model_dir()), **TINY) as engine:
        await engine.submit(prompt_ids(200), SamplingParams(max_new_tokens=30, ignore_eos=True))
        totals = (await engine.status()).totals
        computed = totals["decode_seconds"] - totals["waiting_seconds"] - totals["sending_seconds"]
        for _ in range(200):  # tasks report when they end, which is after the request has ended
            if not any(worker.state.tasks for worker in workers):
                break
            await asyncio.sleep(0.05)
        told = told_by(workers)
        assert told["distkv compute"] > computed > 0
        assert told["distkv send queries"] >= totals["sending_seconds"] > 0
        assert told["distkv wait for partials"] >= totals["waiting_seconds"] > 0
        assert told["distkv queries"] == totals["bytes_to_holders"] > 0  # holders and homes count alike
        assert told["distkv partials"] == totals["bytes_to_homes"] > 0
        assert told["distkv idle"] > 0 <= told["distkv wait for lane"]
