"""The number of stages is chosen from file sizes and workers' memory, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from distkv_dask.client.session.stage_count import BARE, IMPORTED, WorkerMemory, memories, stage_count
from distkv_dask.models.source import resolve_model
from distkv_dask.placement import Stage

KV = 1 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 12 layers of 3.5 MB each."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = transformers.LlamaConfig(num_hidden_layers=12, vocab_size=500, **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def limit(weights: int, resident: int = IMPORTED) -> int:
    """The memory limit of a worker that has just room for weights."""
    return int((weights + KV + resident) / 0.8) + 2


@pytest.mark.parametrize("count", [1, 2, 3, 5, 12])
def test_the_fewest_workers_are_chosen_that_have_room(model: Path, count: int) -> None:
    source = resolve_model(str(model))
    config: Any = source.config()
    whole = source.weight_bytes(config, "auto")
    stages = [Stage(number, count) for number in range(count)]
    sizes = [source.stage_memory(config, "auto", one.layers(12), not one.number)[0] for one in stages]
    assert whole is not None
    need = whole if count == 1 else max(size for size in sizes if size is not None)
    assert stage_count(source, "auto", [WorkerMemory(limit(need), 0)] * 12, KV) == count
    less = [WorkerMemory(limit(need) - 2000, 0)] * 12
    assert stage_count(source, "auto", less, KV) != count or count == 12


def test_workers_with_more_room_are_counted_first_and_too_few_are_said_by_the_workers(model: Path) -> None:
    source = resolve_model(str(model))
    small, large = WorkerMemory(limit(1), 0), WorkerMemory(limit(1 << 30), 0)
    assert stage_count(source, "auto", [small, large, small], KV) == 1
    assert stage_count(source, "auto", [small, small], KV) == 1
    assert stage_count(source, "auto", [WorkerMemory(0, 0)], KV) == 1, "a worker without a limit"
    assert stage_count(source, "bfloat16", [small] * 12, KV) == 1, "weights that are converted are on one worker"
    busy = WorkerMemory(limit(1 << 30), 1 << 30)
    assert stage_count(source, "auto", [busy, large], KV) == 1
    assert not busy.has_room(1 << 30, KV)
    assert WorkerMemory(limit(100, BARE + 1), BARE + 1).has_room(100, KV)


def test_workers_that_only_hold_kv_load_no_stage() -> None:
    def worker(**resources: float) -> dict[str, Any]:
        return {"memory_limit": 100, "metrics": {"memory": 7}, "resources": resources}

    found = memories({"a": worker(), "b": worker(**{"distkv-memory": 1}), "c": worker() | {"memory_limit": None}})
    assert found == [WorkerMemory(100, 7), WorkerMemory(0, 7)]
