"""Every query of the Grafana dashboard names metrics and labels that the scheduler serves."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from distkv_dask.config import Config
from distkv_dask.placement import Endpoint
from distkv_dask.scheduler.dashboard.prometheus import Collector
from distkv_dask.scheduler.engines.figures import Figures
from distkv_dask.scheduler.lifecycle.events import WorkerReady
from distkv_dask.scheduler.lifecycle.machine import Lifecycle
from distkv_dask.scheduler.records.machine_state import MachineState

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana" / "distkv.json"


def served() -> dict[str, set[str]]:
    """Names of all samples of a scheduler with one engine, and the labels that each has."""
    machine = Lifecycle(MachineState("engine", Config.load(), itertools.count(1), block_bytes=1024))
    machine.handle(WorkerReady(Endpoint("w0", "127.0.0.1", 1), 10), 0.0)
    figures = Figures()
    figures.happened(0.0, "move", "")
    registry = CollectorRegistry()
    engine = SimpleNamespace(life=machine.state, figures=figures)
    registry.register(Collector(SimpleNamespace(engines={"engine": engine}, past=Figures())))
    families = text_string_to_metric_families(generate_latest(registry).decode())
    found: dict[str, set[str]] = {}
    for family in families:
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_every_query_refers_to_metrics_and_labels_that_exist() -> None:
    known = served()
    queries = [target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]]
    assert len(queries) > 10
    for query in queries:
        names = re.findall(r"distkv_\w+", query)
        assert names
        assert set(names) <= known.keys(), query
        labels = set(re.findall(r"by \((\w+)\)", query)) | set(re.findall(r"(\w+)=\"", query))
        assert labels <= set().union(*(known[name] for name in names)), query
