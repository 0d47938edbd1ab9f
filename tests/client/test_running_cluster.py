"""Commands that look at a running cluster, and the one that measures it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result
from distributed import Client, LocalCluster

from distkv_dask import Engine
from distkv_dask.client.bench import Decode, Prefill
from distkv_dask.client.bench_plot import plot
from distkv_dask.client.cli import main
from distkv_dask.client.commands import engines, status
from distkv_dask.client.commands.connect import local_cluster
from distkv_dask.version import VERSION
from tests._models import model_dir, prompt_ids

TINY = {"dtype": "float32", "kv_memory": "4 MiB"}


def call(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, [str(one) for one in arguments])


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster:
        yield cluster.scheduler_address


def test_documents_are_listed_with_name_size_and_place_whoever_ingested_them(address: str) -> None:
    assert json.loads(call("documents", "--json", "--scheduler", address).output) == []
    with Client(address) as client, Engine(client, str(model_dir("llama-gqa")), block_tokens=8, **TINY) as engine:
        document = engine.ingest(prompt_ids(80), name="annual [report]")
        (found,) = json.loads(call("documents", "--json", "--scheduler", address).output)
        assert (found["engine"], found["name"], found["tokens"]) == (engine.id, "annual [report]", 80)
        assert (found["questions"], found["state"]) == (0, "stored")
        assert sum(found["workers"].values()) == 80
        listed = call("documents", "--scheduler", address).output
        assert "annual [report]" in listed
        assert all(f"{worker}: {tokens}" in listed for worker, tokens in found["workers"].items())
        document.release()
        assert json.loads(call("documents", "--json", "--scheduler", address).output) == []


def test_watching_shows_what_is_new_until_it_is_interrupted(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[float] = []

    def look_twice(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) > 2:
            raise KeyboardInterrupt
        if len(looks) == 2:
            engine.ingest(prompt_ids(80))

    with Client(address) as client, Engine(client, str(model_dir("llama-gqa")), block_tokens=8, **TINY) as engine:
        monkeypatch.setattr(status, "sleep", look_twice)
        done = call("status", "--watch", "--scheduler", address)
        monkeypatch.undo()
        assert done.exit_code == 0, done.output
        assert engine.id in done.output
        assert "1 document;" in done.output
    assert looks == [status.INTERVAL] * 3


def test_a_watched_cluster_that_ends_is_an_error_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster:
        monkeypatch.setattr(status, "sleep", lambda _: cluster.close())
        monkeypatch.setattr(engines, "LIMIT", 2.0)
        done = call("status", "--watch", "--scheduler", cluster.scheduler_address)
    assert done.exit_code == 1, done.output
    assert "Traceback" not in done.output
    assert isinstance(done.exception, SystemExit)


@pytest.mark.parametrize("command", ["status", "documents"])
def test_a_scheduler_of_another_version_is_named_with_both_versions(
    address: str, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    with Client(address) as client, Engine(client, str(model_dir("llama-gqa")), block_tokens=8, **TINY):
        monkeypatch.setattr(engines, "VERSION", "0.0.1")
        done = call(command, "--scheduler", address)
    assert done.exit_code == 1, done.output
    assert f"client runs distkv-dask 0.0.1, the scheduler {VERSION}" in done.output


def test_help_names_only_options_that_the_command_uses() -> None:
    for command in ("ingest", "bench"):
        shown = call(command, "--help").output
        assert "--model" in shown
        assert "--temperature" not in shown
    for command in ("status", "documents"):
        shown = call(command, "--help").output
        assert "started" not in shown
        assert call(command).exit_code == 2


def test_a_measurement_has_a_table_a_picture_and_figures(address: str, tmp_path: Path) -> None:
    began = time.perf_counter()
    model = "--model", model_dir("llama-gqa")
    done = call(
        "bench", *model, "--dtype", "float32", "--kv-memory", "4 MiB", "--scheduler", address,
        "--prompt", 60, "--prompt", 20, "--prompt", 10**6, "--batch", 1, "--batch", 3, "--new-tokens", 5,
        "--plot", tmp_path / "bench.svg", "--json", tmp_path / "bench.json",
    )  # fmt: skip
    took = time.perf_counter() - began
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "bench.json").read_text())
    assert [one["prompt_tokens"] for one in found["prefill"]] == [20, 60]
    assert [one["batch"] for one in found["decode"]] == [1, 3]
    for one in found["prefill"]:
        assert 0 < one["first_token_seconds"] < took
        assert one["tokens_per_second"] > one["prompt_tokens"] / took
    for one in found["decode"]:
        assert one["tokens_per_second"] > one["batch"] * 4 / took
        assert 0 < one["token_seconds"] < took
    assert "Left out: 1," in done.output
    words = "".join(ElementTree.parse(tmp_path / "bench.svg").getroot().itertext())
    assert "60 tokens" in words
    assert "3 at once" in words


def test_bars_of_a_picture_are_as_long_as_their_values() -> None:
    svg = plot("<m>", [Prefill(10, 1.0, 10.0, 1), Prefill(20, 4.0, 5.0, 1)], [Decode(1, 7.0, 0.1)])
    bars = [
        float(one.get("width", "")) for one in ElementTree.fromstring(svg).iter() if one.get("fill", "")[0:1] == "#"
    ]
    assert bars[1] == pytest.approx(4 * bars[0], rel=0.01)
    assert bars[2] == pytest.approx(2 * bars[3], rel=0.01)


def test_a_worker_that_ends_too_slowly_does_not_make_a_command_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    close = LocalCluster.close

    def slowly(cluster: LocalCluster, timeout: float | None = None) -> None:
        close(cluster, timeout)
        raise TimeoutError

    monkeypatch.setattr(LocalCluster, "close", slowly)
    with local_cluster(1, 1, None, processes=False, dashboard_address=None) as cluster:
        assert len(cluster.workers) == 1
