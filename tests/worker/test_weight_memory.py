"""A model that is too large for a worker is refused before it is loaded, with numbers of bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from _models import model_dir

from distkv_dask.config import Config
from distkv_dask.errors import CapacityError, DeviceError, UnsupportedModelError
from distkv_dask.messages.names import KV_MEMORY_RESOURCE, EngineSpec
from distkv_dask.models.source import resolve_model
from distkv_dask.worker import weight_memory
from distkv_dask.worker.device import HOST
from distkv_dask.worker.model.load import load_model
from distkv_dask.worker.weight_memory import is_from_disk

GIB = 1 << 30


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A model of 6 GiB in bfloat16, with only names and sizes on disk."""
    config = json.loads((model_dir("llama-gqa") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 1 << 24, "dtype": "bfloat16"}))
    sizes = {"model.embed_tokens.weight": [1 << 24, 96], "lm_head.weight": [1 << 24, 96]}
    header, at = {}, 0
    for name, shape in sizes.items():
        stop = at + 2 * shape[0] * shape[1]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return tmp_path


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A machine with a lot of memory; a test can replace it."""

    def give(free: int) -> None:
        monkeypatch.setattr(weight_memory, "free_memory", lambda: free)

    give(1 << 40)
    return give


def worker(left: int, **resources: int) -> Any:
    """A worker with this many bytes left."""
    limit = int((psutil.Process().memory_info().rss + left) / 0.8)
    return SimpleNamespace(
        address="tcp://w",
        memory_manager=SimpleNamespace(memory_limit=limit),
        state=SimpleNamespace(total_resources=resources),
    )


def spec(model: Path, dtype: str = "auto", kv_memory: int | None = GIB, weights: str = "auto") -> EngineSpec:
    return EngineSpec(
        "engine", str(model), dtype, "token", replace(Config.load(), kv_memory=kv_memory, weights=weights)
    )


def test_weights_that_do_not_fit_are_refused_with_both_numbers(large: Path) -> None:
    with pytest.raises(
        CapacityError, match=rf"need {6 * GIB} bytes.*but (\d+) bytes are left.*at least (\d+)"
    ) as caught:
        is_from_disk(spec(large), worker(5 * GIB), HOST)
    left, least = (int(one) for one in re.search(r"but (\d+) bytes.*at least (\d+)", str(caught.value)).groups())
    assert left == pytest.approx(5 * GIB, rel=0.1)
    assert 0.8 * least >= 7 * GIB
    assert "share weights" in str(caught.value)
    is_from_disk(spec(large), worker(8 * GIB), HOST)


def test_kv_memory_that_does_not_fit_beside_the_weights_is_refused_with_what_does(large: Path) -> None:
    with pytest.raises(CapacityError, match=r"kv_memory.*to at most (\d+)") as caught:
        is_from_disk(spec(large, kv_memory=4 * GIB), worker(8 * GIB), HOST)
    most = int(re.search(r"at most (\d+)", str(caught.value))[1])
    assert most == pytest.approx(2 * GIB, rel=0.1)
    is_from_disk(spec(large, kv_memory=most - GIB // 4), worker(8 * GIB), HOST)
    with pytest.raises(CapacityError, match=f"kv_memory of {4 * GIB} bytes"):
        is_from_disk(spec(large), worker(8 * GIB, **{KV_MEMORY_RESOURCE: 4 * GIB}), HOST)


def test_a_machine_that_is_too_small_is_told_so_whatever_dask_allows(
    large: Path, machine: Callable[[int], None]
) -> None:
    machine(int(6.5 * GIB))
    with pytest.raises(
        CapacityError, match=rf"machine.*need {6 * GIB} bytes.*share.*{GIB}, but {int(6.5 * GIB)} bytes"
    ):
        is_from_disk(spec(large), worker(8 * GIB), HOST)
    unlimited = worker(0)
    unlimited.memory_manager.memory_limit = None
    with pytest.raises(CapacityError, match=r"machine"):
        is_from_disk(spec(large), unlimited, HOST)
    machine(8 * GIB)
    is_from_disk(spec(large), unlimited, HOST)


def test_by_default_kv_gets_half_of_what_weights_leave(large: Path) -> None:
    """Half of the limit itself would not fit together with weights of more than 0.3 of it."""
    is_from_disk(spec(large, kv_memory=None), worker(14 * GIB), HOST)  # the limit is larger by what this process holds


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A model of 6 GiB in 12 layers, with only names and sizes on disk."""
    config = json.loads((model_dir("llama-gqa") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 12, "dtype": "bfloat16"}))
    size, header = GIB // 2, {}
    for at in range(12):
        offsets = [at * size, (at + 1) * size]
        header[f"model.layers.{at}.mlp.up_proj.weight"] = {
            "dtype": "BF16", "shape": [1024, size >> 11], "data_offsets": offsets
        }  # fmt: skip
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 12 * size)
    return tmp_path


def test_layers_are_read_from_disk_where_weights_do_not_fit(deep: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not is_from_disk(spec(deep), worker(8 * GIB), HOST)
    assert not caplog.text
    assert is_from_disk(spec(deep), worker(3 * GIB), HOST)
    assert f"from disk (distkv.weights: auto): in memory its weights need {6 * GIB} bytes" in caplog.text
    with pytest.raises(CapacityError, match=rf"need {GIB} bytes \(dtype auto, layers on disk, of {6 * GIB}\)"):
        is_from_disk(spec(deep), worker(GIB // 2), HOST)
    with pytest.raises(CapacityError, match=f"need {12 * GIB} bytes"):  # they would be converted, which takes memory
        is_from_disk(spec(deep, "float32"), worker(3 * GIB), HOST)


def test_where_weights_are_can_be_said(deep: Path) -> None:
    assert is_from_disk(spec(deep, weights="disk"), worker(8 * GIB), HOST)
    with pytest.raises(CapacityError, match=f"need {6 * GIB} bytes"):
        is_from_disk(spec(deep, weights="memory"), worker(3 * GIB), HOST)
    card: Any = SimpleNamespace(is_host=False, name="cuda:0", memory=lambda: (80 * GIB, 80 * GIB))
    with pytest.raises(DeviceError, match=r"distkv\.weights to auto"):
        is_from_disk(spec(deep, weights="disk"), worker(8 * GIB), card)


def test_another_dtype_needs_another_amount(large: Path) -> None:
    with pytest.raises(CapacityError, match=f"need {12 * GIB} bytes"):
        is_from_disk(spec(large, "float32"), worker(8 * GIB), HOST)


def test_a_card_that_is_too_small_is_told_so(large: Path) -> None:
    card: Any = SimpleNamespace(is_host=False, name="cuda:0", memory=lambda: (4 * GIB, 8 * GIB))
    with pytest.raises(DeviceError, match=f"need {6 * GIB} bytes.*{4 * GIB} of {8 * GIB}"):
        is_from_disk(spec(large), worker(GIB), card)


def test_why_a_model_is_not_served_is_said_before_its_size(large: Path) -> None:
    config = json.loads((large / "config.json").read_text())
    (large / "config.json").write_text(json.dumps(config | {"is_causal": False}))
    with pytest.raises(UnsupportedModelError):
        is_from_disk(spec(large), worker(GIB), HOST)


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3-moe", "phi3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_weights_need_is_known_before_they_are_loaded(family: str, dtype: str) -> None:
    source = resolve_model(str(model_dir(family)))
    model: Any = load_model(source.name, dtype, 1)._model
    held = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    assert source.weight_bytes(source.config(), dtype) == held
