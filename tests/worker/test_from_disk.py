"""Layers that are read from disk while others compute give the same bits in bounded memory; errors say why."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from distributed import Client, Scheduler, Worker

from distkv_dask import Engine, SamplingParams
from distkv_dask.errors import DistKVError, ModelError, UnsupportedModelError
from distkv_dask.worker.model import host_copy, host_files
from distkv_dask.worker.model.from_disk import DiskLayers, WeightFile
from distkv_dask.worker.model.load import load_model
from distkv_dask.worker.model.loaded import LoadedModel
from distkv_dask.worker.model.mapped import FileMaps
from distkv_dask.worker.model.packed import Choice
from tests._cluster import about_the_host, engine_test
from tests._models import FAMILIES, model_dir, prompt_ids, reference_generate

pytestmark = about_the_host("weights on a card are in its memory")


class EachItself:
    """Replaces attention by a function of each token's own query, key and value."""

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, sinks: Any = None
    ) -> torch.Tensor:
        groups = q.shape[1] // v.shape[1]
        values = v.repeat_interleave(groups, 1)
        return values + scale * (q * k.repeat_interleave(groups, 1))[..., : v.shape[-1]]


def logits(model: LoadedModel, tokens: int) -> torch.Tensor:
    return model.forward(torch.arange(tokens) + 7, torch.arange(tokens), EachItself())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model that a test may damage."""
    return Path(shutil.copytree(model_dir("llama-gqa"), tmp_path / "model"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_have_the_same_bits(family: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models with odd and even numbers of layers, and with weights that are joined or converted when loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(host_copy, "LEAST", 1)
    memory = load_model(str(model_dir(family)), dtype, 1)
    disk = load_model(str(model_dir(family)), dtype, 1, from_disk=True)
    assert "from disk" in disk.weights.where
    assert disk.fingerprint == memory.fingerprint
    for tokens in (1, 9, 9):
        assert torch.equal(logits(disk, tokens), logits(memory, tokens))


def test_a_disk_without_room_is_named_with_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(host_copy, "LEAST", 1)
    monkeypatch.setattr(host_files, "FREE", 0.1)
    full = host_files.shutil.disk_usage(tmp_path)._replace(total=1000, free=77)
    monkeypatch.setattr(host_files.shutil, "disk_usage", lambda _: full)
    needs = r"a file of \d{6,} bytes .* disk of .*weights: 77 of 1000 bytes are free.*XDG_CACHE_HOME"
    with pytest.raises(ModelError, match=needs):
        load_model(str(model_dir("llama-gqa")), "bfloat16", 1, from_disk=True)
    alone = load_model(str(model_dir("llama-gqa")), "bfloat16", 1)
    assert "77 of 1000 bytes are free" in alone.weights.where


def test_nothing_is_packed_of_what_is_in_a_buffer_for_a_moment(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(host_copy, "LEAST", 1)
    disk = load_model(str(folder), "bfloat16", 1, from_disk=True)
    expected = logits(disk, 4)
    disk.pack(1 << 40, 512, lambda: Choice(onednn=True))
    assert not disk.is_packed
    assert torch.equal(logits(disk, 4), expected)


def test_two_layers_are_in_memory_and_no_file_is_mapped(folder: Path) -> None:
    disk = load_model(str(folder), "float32", 1, from_disk=True)
    logits(disk, 4)
    model: Any = disk._model
    maps = FileMaps()
    assert not any(maps.of(tensor) for tensor in (*model.parameters(), *model.buffers()))
    assert str(folder) not in Path("/proc/self/maps").read_text()
    held = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in model.parameters()}
    whole = sum(one.nbytes for one in model.parameters())
    layer = sum(one.nbytes for one in model.model.layers[0].parameters())
    assert sum(held.values()) == pytest.approx(whole - layer, rel=0.01)  # two of three layers
    assert disk.weight_bytes == pytest.approx(whole - layer, rel=0.01)


def test_every_layer_is_read_once_a_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = load_model(str(folder), "float32", 1, from_disk=True)
    logits(disk, 4)
    read = list[int]()

    def reading(self: WeightFile, offset: int, target: memoryview) -> None:
        read.append(len(target))
        plainly(self, offset, target)

    plainly = WeightFile.read
    monkeypatch.setattr(WeightFile, "read", reading)
    for _ in range(3):
        logits(disk, 4)
    model: Any = disk._model
    layer = sum(one.nbytes for one in model.model.layers[0].parameters())
    assert 8 * layer <= sum(read) <= 10 * layer  # the first one of the next step is being read ahead


def test_weights_that_layers_share_stay_in_memory(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    layers = model.model.layers
    layers[2].mlp = layers[0].mlp
    layers[1].input_layernorm = model.model.norm
    shared = {*layers[0].mlp.parameters(), *model.model.norm.parameters()}
    expected = {id(one): one.detach().clone() for one in shared}
    disk = DiskLayers(model)
    maps = FileMaps()
    for layer in range(len(layers)):
        disk.take_layer(layer)
        for one in shared:
            assert maps.of(one) is None
            assert torch.equal(one, expected[id(one)])


def test_a_model_that_calls_no_layers_is_refused(folder: Path) -> None:
    disk = DiskLayers(transformers.AutoModelForCausalLM.from_pretrained(folder))
    disk.take_layer(0)
    with pytest.raises(UnsupportedModelError, match="does not call its layers"):
        disk.check_taken()


def test_a_file_that_is_cut_short_is_an_error_and_not_the_end_of_the_process(folder: Path) -> None:
    disk = load_model(str(folder), "float32", 1, from_disk=True)
    logits(disk, 4)
    os.truncate(folder / "model.safetensors", 1 << 12)
    for _ in range(2):
        with pytest.raises(ModelError, match=r"model\.safetensors was changed or cut short"):
            logits(disk, 4)


def test_a_file_that_is_overwritten_is_an_error(folder: Path) -> None:
    disk = load_model(str(folder), "float32", 1, from_disk=True)
    shutil.copyfile(folder / "model.safetensors", folder / "copy")
    shutil.copyfile(folder / "copy", folder / "model.safetensors")
    with pytest.raises(ModelError, match="was changed"):
        logits(disk, 4)


def test_a_file_that_is_removed_is_there_for_as_long_as_the_model(folder: Path) -> None:
    disk = load_model(str(folder), "float32", 1, from_disk=True)
    expected = logits(disk, 4)
    shutil.rmtree(folder)
    assert torch.equal(logits(disk, 4), expected)


def test_a_step_that_fails_leaves_nothing_behind(folder: Path) -> None:
    class Failing(EachItself):
        def attend(self, layer: int, *arguments: Any) -> torch.Tensor:
            if layer == 1:
                raise ZeroDivisionError
            return super().attend(layer, *arguments)

    disk = load_model(str(folder), "float32", 1, from_disk=True)
    expected = logits(disk, 4)
    with pytest.raises(ZeroDivisionError):
        disk.forward(torch.arange(4) + 7, torch.arange(4), Failing())
    assert torch.equal(logits(disk, 4), expected)


def test_thread_and_file_end_with_the_model(folder: Path) -> None:
    disk = load_model(str(folder), "float32", 1, from_disk=True)
    logits(disk, 4)
    assert any(str(folder) in os.readlink(one) for one in _open_files())
    gc.disable()
    try:
        del disk
        for thread in threading.enumerate():
            if thread.name == "distkv-weights":
                thread.join()
        assert not any(str(folder) in os.readlink(one) for one in _open_files())
    finally:
        gc.enable()


def _open_files() -> list[Path]:
    return [one for one in Path("/proc/self/fd").iterdir() if one.is_symlink()]


def test_weights_that_are_not_on_disk_as_they_are_used_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # nor can they be written
    with pytest.raises(UnsupportedModelError, match=r"distkv\.weights to memory"):
        load_model(str(folder), "bfloat16", 1, from_disk=True)


@engine_test(workers=2, own_kv=[6 << 16, 6 << 16])
async def test_tokens_from_disk_are_those_of_transformers(client: Client, scheduler: Scheduler, *_: Worker) -> None:
    folder = Path(shutil.copytree(model_dir("llama-gqa"), Path(tempfile.mkdtemp()) / "model"))
    prompts = [prompt_ids(150, seed=1), prompt_ids(30, seed=2)]
    expected = [one.tokens for one in reference_generate(model_dir("llama-gqa"), prompts, 10)]
    wanted = SamplingParams(max_new_tokens=10, ignore_eos=True)
    async with Engine(client, str(folder), dtype="float32", block_tokens=8, weights="disk") as engine:
        running = [engine.submit(prompt, wanted) for prompt in prompts]
        assert [list((await done).token_ids) for done in running] == expected
        status = await engine.status()
        assert all("layers from disk" in one.weights for one in status.workers.values())
        os.truncate(folder / "model.safetensors", 1 << 12)
        with pytest.raises(DistKVError, match="cut short"):
            await engine.submit(prompts[1], wanted)
    shutil.rmtree(folder.parent)
