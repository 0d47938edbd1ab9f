"""``distkv models check`` says before any cluster starts what an engine would say when it opens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from click.testing import CliRunner, Result
from distributed import LocalCluster
from distributed.system import MEMORY_LIMIT

from distkv_dask.client.cli import main
from distkv_dask.client.commands.models import room_on
from distkv_dask.config import Config
from distkv_dask.models.model_report import kv_bytes_per_token, report_on, window_bytes
from distkv_dask.worker.blocks.pool import BlockShape
from distkv_dask.worker.model.load import load_model
from tests._models import FAMILIES, HYBRIDS, block_bytes, model_dir

GIB = 1 << 30

SERVED = {**FAMILIES, **HYBRIDS}


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["models", "check", *(str(one) for one in arguments)])


def test_a_model_that_is_served_has_its_memory_and_window_said() -> None:
    model = model_dir("llama-gqa")
    done = call(model, "--json", "--dtype", "float32")
    assert done.exit_code == 0, done.output
    said = json.loads(done.output)
    assert (said["served"], said["reason"], said["type"], said["window"]) == (True, None, "llama", 4096)
    assert said["kv_bytes_per_token"] == block_bytes("llama-gqa", 1)
    assert said["weight_bytes"] == pytest.approx((model / "model.safetensors").stat().st_size, rel=0.01)
    halves = json.loads(call(model, "--json", "--dtype", "bfloat16", "--rope-scaling", "yarn:4").output)
    assert (2 * halves["weight_bytes"], halves["window"]) == (said["weight_bytes"], 4 * 4096)
    assert "is served" in call(model).output


def test_a_model_that_is_not_served_has_the_reason_said_and_status_1(tmp_path: Path) -> None:
    transformers.MambaConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    done = call(tmp_path, "--json")
    said = json.loads(done.output)
    assert (done.exit_code, said["served"], said["type"]) == (1, False, "mamba")
    assert "state-space" in said["reason"]
    done = call(tmp_path)
    assert (done.exit_code, "(mamba) is not served: " in done.output) == (1, True)
    transformers.GPTJConfig(n_layer=2, n_embd=64, n_head=4, rotary_dim=16).save_pretrained(tmp_path)
    assert "attention in its own code" in call(tmp_path).output
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read as JSON" in call(tmp_path).output
    assert "no-such" in call("no-such-model").output


@pytest.mark.parametrize("family", SERVED)
def test_the_kv_memory_said_is_that_of_the_pool(family: str) -> None:
    geometry = load_model(str(model_dir(family)), "float32", 1).geometry
    config: Any = SERVED[family]()
    assert kv_bytes_per_token(config.get_text_config(), "float32") == BlockShape.of(geometry, 1).nbytes
    assert window_bytes(config.get_text_config(), "float32") == geometry.home_bytes - geometry.state_bytes


def worker(limit: int, held: int = 0, **resources: int) -> dict[str, Any]:
    return {"memory_limit": limit, "metrics": {"memory": held}, "resources": resources}


def test_the_longest_sequence_counts_workers_that_the_model_fits() -> None:
    report = replace(report_on(str(model_dir("llama-gqa"))), weight_bytes=2 * GIB, kv_bytes_per_token=GIB >> 10)
    report = replace(report, window=1 << 20)
    config = replace(Config.load(), kv_memory=None, block_tokens=16)
    said = room_on({"a": worker(8 * GIB), "b": worker(4 * GIB), "c": worker(8 * GIB)}, report, config)
    assert said["longest_context"] == (3 + 1 + 3) * 1024
    assert not said["workers_too_small"]
    said = room_on({"a": worker(8 * GIB), "b": worker(4 * GIB, GIB)}, report, config)
    assert said["longest_context"] == 3 * 1024
    assert list(said["workers_too_small"]) == ["b"]
    assert said["workers_too_small"]["b"]["memory_limit_needed"] == int(4 * GIB / 0.8)
    own = {"distkv-kv-memory": GIB}
    said = room_on({"a": worker(8 * GIB, 2 * GIB), "b": worker(4 * GIB, **own)}, report, config)
    assert said["longest_context"] == 1024  # a has no room for 3 GiB in addition to what it holds, b none for its own
    only = {"distkv-memory": 1}
    assert room_on({"a": worker(4 * GIB, **only)}, report, config)["longest_context"] == 0
    said = room_on({"a": worker(8 * GIB), "b": worker(4 * GIB, **only)}, report, config)
    assert said["longest_context"] == (3 + 2) * 1024
    said = room_on({"a": worker(0)}, report, replace(config, kv_memory=3 * GIB))
    assert said["longest_context"] == 3 * 1024
    assert room_on({"a": worker(8 * GIB)}, replace(report, window=500), config)["longest_context"] == 500


def test_the_memory_limit_of_workers_that_share_weights_is_said() -> None:
    said = json.loads(call(model_dir("llama-gqa"), "--json", "--workers", 3).output)
    beside = said["memory_limit"] - said["weight_bytes"]
    assert 3 * beside + said["weight_bytes"] == pytest.approx(MEMORY_LIMIT, rel=1e-6)
    assert "memory limit of each worker here" in call(model_dir("llama-gqa"), "--workers", 3).output


def test_a_running_cluster_is_asked_for_its_memory() -> None:
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None, memory_limit="16 GiB"
    ) as cluster:
        model = model_dir("llama-gqa")
        arguments = "--dtype", "float32", "--kv-memory", "1 MiB", "--scheduler", cluster.scheduler_address
        said = json.loads(call(model, "--json", *arguments).output)
        blocks = (1 << 20) // (block_bytes("llama-gqa", Config.load().block_tokens))
        assert said["longest_context"] == 2 * blocks * Config.load().block_tokens
        assert "longest sequence on this cluster of 2 workers" in call(model, *arguments).output
