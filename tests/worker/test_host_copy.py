"""Processes of a machine that load the same model have its weights in memory once, converted or not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from filelock import FileLock
from safetensors.torch import load_file, save_file

from distkv_dask.errors import ModelError
from distkv_dask.worker.model import host_copy, host_files
from distkv_dask.worker.model.host_copy import own_bytes
from distkv_dask.worker.model.load import load_model
from distkv_dask.worker.model.loaded import LoadedModel
from tests._cluster import about_the_host
from tests._models import FAMILIES, HYBRIDS, model_dir

pytestmark = about_the_host("weights on a card are copies")

MB = 1 << 20


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder for files of weights."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "distkv-dask" / "weights"


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Share weights of any size."""
    monkeypatch.setattr(host_copy, "LEAST", 1)


def weights(model: LoadedModel) -> dict[str, torch.Tensor]:
    return dict(model._model.named_parameters())


@pytest.mark.usefixtures("cache")
def test_two_processes_have_weights_in_memory_once(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    program = Path(__file__).parents[1] / "_weight_memory.py"
    command = [sys.executable, str(program), str(tmp_path / "model"), "bfloat16", "float32"]
    said = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    for alone, both, own in said.values():  # the checkpoint's own dtype, and a conversion
        assert own == 0
        assert both <= 1.1 * alone
    assert 40 * MB < said["bfloat16"][0] < 60 * MB < said["float32"][0]


@pytest.mark.usefixtures("cache", "any_size")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen3-moe", "gpt-oss", "deepseek-v3", "nemotron-h", "phi3"])
def test_weights_from_the_file_are_those_of_the_checkpoint(family: str, dtype: str) -> None:
    """Experts are joined when loaded, so they are not mapped from the checkpoint in its own dtype either."""
    assert family in FAMILIES | HYBRIDS
    first, second = (load_model(str(model_dir(family)), dtype, 1) for _ in range(2))
    assert own_bytes(first._model) == own_bytes(second._model) == 0
    files = [one.weights.where.split(";")[0] for one in (first, second)]  # which rows are skipped is timed
    assert files[0] == files[1]
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(model_dir(family), dtype=dtype)
    expected = dict(plain.named_parameters())
    for name, weight in weights(second).items():
        assert weight.dtype == expected[name].dtype
        assert torch.equal(weight, expected[name])


@pytest.mark.usefixtures("cache")
def test_weights_of_a_changed_checkpoint_are_read_anew(any_size: None, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    load_model(str(file.parent), "bfloat16", 1)
    changed = {name: weight + 1 for name, weight in load_file(file).items()}
    file.unlink()
    save_file(changed, file, metadata={"format": "pt"})
    for name, weight in weights(load_model(str(file.parent), "bfloat16", 1)).items():
        assert torch.equal(weight, changed[name].bfloat16())


@pytest.mark.usefixtures("any_size")
def test_the_files_used_longest_ago_make_room(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = load_model(str(model_dir("llama-mha")), "bfloat16", 1)
    old = next(cache.glob("*.safetensors"))
    disk = host_files.shutil.disk_usage(cache)
    free = [0]  # until the old file is gone
    monkeypatch.setattr(
        host_files.shutil, "disk_usage", lambda _: disk._replace(free=free[0] if old.exists() else disk.total)
    )
    load_model(str(model_dir("llama-gqa")), "bfloat16", 1)
    assert not old.exists()
    assert len(list(cache.glob("*.safetensors"))) == 1
    assert all(weight.isfinite().all() for weight in weights(used).values())  # it is mapped still
    monkeypatch.setattr(host_files.shutil, "disk_usage", lambda _: disk._replace(free=0))
    alone = load_model(str(model_dir("llama-mqa")), "bfloat16", 1)
    assert "of this process alone" in alone.weights.where
    assert not list(cache.glob("*.safetensors"))


@pytest.mark.usefixtures("any_size")
def test_a_folder_that_cannot_be_written_costs_memory_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    alone = load_model(str(model_dir("llama-mqa")), "bfloat16", 1)
    assert own_bytes(alone._model) == alone.weight_bytes
    assert "XDG_CACHE_HOME" in alone.weights.where
    assert "of this process alone" in caplog.text


@pytest.mark.usefixtures("any_size")
def test_a_process_that_loads_for_ever_is_not_waited_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_model(str(model_dir("llama-mqa")), "bfloat16", 1)
    file = next(cache.glob("*.safetensors"))
    monkeypatch.setattr(host_copy, "WAIT", 0.01)
    with FileLock(f"{file}.lock"), pytest.raises(ModelError, match=r"another process.*\.lock"):
        load_model(str(model_dir("llama-mqa")), "bfloat16", 1)
