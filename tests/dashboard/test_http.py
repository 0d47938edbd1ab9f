"""JSON, metrics and pages of a scheduler before its first engine, with engines, and after the last one."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import Any

import prometheus_client
import pytest
from distributed import Client, Scheduler, Worker
from prometheus_client.parser import text_string_to_metric_families
from tornado.httpclient import AsyncHTTPClient

from distkv_dask import Engine, SamplingParams
from distkv_dask.scheduler.dashboard.page import PANELS
from tests._cluster import engine_test
from tests._models import model_dir, prompt_ids

SHORT = SamplingParams(max_new_tokens=6, ignore_eos=True)
DASHBOARD = {"scheduler_kwargs": {"dashboard": True, "dashboard_address": "127.0.0.1:0"}}


def tiny(client: Client) -> Engine:
    return Engine(client, str(model_dir("llama-gqa")), dtype="float32", kv_memory="4 MiB", block_tokens=8)


async def get(scheduler: Scheduler, path: str) -> str:
    answer = await AsyncHTTPClient().fetch(f"http://127.0.0.1:{scheduler.http_server.port}{path}")
    return answer.body.decode()


async def metrics(scheduler: Scheduler) -> dict[str, list[Any]]:
    families = text_string_to_metric_families(await get(scheduler, "/metrics"))
    return {family.name: family.samples for family in families if family.name.startswith("distkv")}


def value(samples: list[Any], **labels: str) -> float:
    return sum(one.value for one in samples if labels.items() <= one.labels.items() and "_created" not in one.name)


@engine_test(2, **DASHBOARD)
async def test_status_json_is_what_the_engine_says(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
    async with tiny(client) as engine, tiny(client) as other:
        await engine.generate([prompt_ids(40)], SHORT)
        shown = json.loads(await get(scheduler, "/distkv/status.json"))["engines"]
        assert set(shown) == {engine.id, other.id}
        expected = json.loads(json.dumps((await engine.status()).as_dict()))
        assert list(shown[engine.id]) == ["model", *expected]
        del expected["scheduler"]  # its activity changes from second to second
        assert {name: shown[engine.id][name] for name in expected} == expected
    assert json.loads(await get(scheduler, "/distkv/status.json")) == {"engines": {}}


@engine_test(2, **DASHBOARD)
async def test_metrics_agree_with_the_engine_and_outlive_it_as_counters(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    async with tiny(client) as other:
        async with tiny(client) as engine:
            await engine.generate([prompt_ids(40), prompt_ids(50)], SHORT)
            document = await engine.ingest(prompt_ids(24, 9))
            seen = await metrics(scheduler)
            status = await engine.status()
            assert value(seen["distkv_engines"]) == 2
            for address, facts in status.workers.items():
                assert value(seen["distkv_blocks"], worker=address) == 2 * facts.capacity_blocks
                parts = {one: value(seen["distkv_blocks"], worker=address, state=one) for one in asdict(facts.blocks)}
                own = (await other.status()).workers[address].blocks
                assert parts == {one: getattr(facts.blocks, one) + getattr(own, one) for one in parts}
            assert sum(facts.blocks.documents for facts in status.workers.values()) == 3
            assert value(seen["distkv_prompt_tokens"]) == 90 + document.tokens
            assert value(seen["distkv_generated_tokens"]) == 12 == status.totals["generated_tokens"]
            assert value(seen["distkv_requests_finished"], reason="length") == 2
            assert {one.labels["state"] for one in seen["distkv_requests"]} == {
                "waiting", "aside", "prefill", "decode", "retiring", "saving", "spilling", "fetching"
            }  # fmt: skip
            counts = [one for one in seen["distkv_first_token_seconds"] if one.name.endswith("_count")]
            assert counts[0].value == 2
        assert value((await metrics(scheduler))["distkv_generated_tokens"]) == 12
        assert not (await other.status()).sequences
    assert await metrics(scheduler) == {}
    assert not [one for one in prometheus_client.REGISTRY._collector_to_names if "distkv" in type(one).__module__]


@engine_test(1, **DASHBOARD)
async def test_names_follow_openmetrics(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
    from prometheus_client.openmetrics.exposition import generate_latest
    from prometheus_client.openmetrics.parser import text_string_to_metric_families as strict

    async with tiny(client) as engine:
        await engine.generate([prompt_ids(40)], SHORT)
        found = {family.name for family in strict(generate_latest(prometheus_client.REGISTRY).decode())}
    assert {"distkv_blocks", "distkv_queue_seconds", "distkv_waiting_seconds"} <= found


@engine_test(2, **DASHBOARD)
async def test_pages_are_served_and_listed_on_a_running_cluster_and_after_the_engine_left(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    async with tiny(client) as engine:
        await engine.generate([prompt_ids(40)], SHORT)
        assert "bokeh" in await get(scheduler, "/distkv")
        plots = json.loads(await get(scheduler, "/individual-plots.json"))
        for panel in PANELS:
            assert f"/individual-distkv-{panel.name}" in plots.values()
            assert "bokeh" in await get(scheduler, f"/individual-distkv-{panel.name}")
        assert "/individual-task-stream" in plots.values()
        assert 'href="distkv"' in await get(scheduler, "/status")
    assert "bokeh" in await get(scheduler, "/distkv")


@engine_test(1)
async def test_a_scheduler_without_a_dashboard_serves_engines_and_json(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    async with tiny(client) as engine:
        assert len(await engine.generate([prompt_ids(40)], SHORT)) == 1
        assert engine.id in json.loads(await get(scheduler, "/distkv/status.json"))["engines"]


@pytest.mark.parametrize("missing", ["bokeh", "prometheus_client"])
def test_what_is_not_installed_is_left_out_and_nothing_breaks(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    names = [name for name in sys.modules if name.split(".")[0] == missing]
    for name in {missing, *names}:
        monkeypatch.setitem(sys.modules, name, None)  # an import of it raises ImportError

    @engine_test(1)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with tiny(client) as engine:
            assert len(await engine.generate([prompt_ids(40)], SHORT)) == 1
            await asyncio.sleep(0)

    run()
