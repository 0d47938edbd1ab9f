"""Packed weights of a large model are in memory once for all processes of a machine, and give a private copy's bits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from distributed import Client, Scheduler, Worker
from filelock import FileLock
from torch import Tensor

from distkv_dask import Engine, SamplingParams
from distkv_dask.config import Config
from distkv_dask.kernels import few_rows
from distkv_dask.placement import Stage
from distkv_dask.worker.model import host_files, packed_file
from distkv_dask.worker.model.load import load_model
from distkv_dask.worker.model.loaded import LoadedModel
from distkv_dask.worker.model.no_attention import NoAttention
from distkv_dask.worker.model.packed import Choice, FewRowsLinear
from distkv_dask.worker.model.packed_file import usual_rows
from tests._cluster import about_the_host, engine_test
from tests._models import FAMILIES, prompt_ids

pytestmark = [
    about_the_host("weights on a card are not packed"),
    pytest.mark.skipif(few_rows.native_kernel.missing() is not None, reason="no C++ core"),
    pytest.mark.skipif(sys.platform != "linux", reason="mapped files are known on Linux only"),
]
MOST = 24
CHOICE = Choice(((4, few_rows.MODEL), (MOST, few_rows.MODEL)), alone=8)
ROOM = 1 << 30
MB = 1 << 20


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where files of weights go; linears are packed in many parts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(packed_file, "AT_ONCE", 5000)
    return tmp_path / "cache" / "distkv-dask" / "weights"


def chosen() -> Choice:
    return CHOICE


def saved(tmp_path: Path, family: str = "llama-gqa", dtype: torch.dtype = torch.bfloat16, **changes: Any) -> str:
    torch.manual_seed(1)
    config = FAMILIES[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    folder = tmp_path / f"{family}-{dtype}"
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype).save_pretrained(folder)
    return str(folder)


def load(folder: str, stage: Stage | None = None) -> LoadedModel:
    return load_model(folder, "auto", 1, stage=stage)


def files(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.safetensors"))


def logits(model: LoadedModel, tokens: int) -> Tensor:
    ids = torch.arange(tokens)
    return model.forward(ids * 7 % model.geometry.vocab_size, ids, NoAttention(model.geometry.value_dim))


def assert_close(found: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(found, right, rtol=0.05, atol=0.05 * float(right.abs().max()))


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2", "phi3"])
def test_mapped_weights_give_the_bits_of_a_private_copy(family: str, tmp_path: Path, cache: Path) -> None:
    """In layers of the core (Llama), with biases (Qwen2), and in others, for as many rows as both serve."""
    folder = saved(tmp_path, family)
    private, first, second = (load(folder) for _ in range(3))
    private.pack(ROOM, MOST, chosen)
    assert not files(cache)
    first.pack(0, MOST, chosen)
    (file,) = files(cache)
    written = file.stat().st_ino
    second.pack(0, MOST, chosen)
    assert [one.stat().st_ino for one in files(cache)] == [written]
    for rows in (1, 8, *[MOST] * (family == "llama-gqa")):
        expected = logits(private, rows)
        assert torch.equal(logits(first, rows), expected)
        assert torch.equal(logits(second, rows), expected)
    assert f"packed, mapped from {file}: amx_model up to 4 rows" in first.where
    assert ("layers computed in C++" in first.where) == (family == "llama-gqa")


def test_all_rows_are_computed_with_packed_weights_however_many(tmp_path: Path) -> None:
    model = load(saved(tmp_path, "qwen2"))
    linears = {name: one for name, one in model._model.named_modules() if type(one) is torch.nn.Linear}
    expected = logits(model, 3 * MOST + 1)
    model.pack(0, MOST, chosen)
    assert all(isinstance(linear.forward, FewRowsLinear) for linear in linears.values())
    for linear in linears.values():
        linear.weight.data = torch.full_like(linear.weight, torch.nan)
    assert_close(logits(model, 3 * MOST + 1), expected)
    one = linears["model.layers.0.self_attn.q_proj"]
    for shape in ((MOST + 1, 96), (2, MOST, 96), (0, 96), (1, 0, 96)):
        rows = torch.randn(shape).bfloat16()
        found = one(rows)
        assert found.shape == (*shape[:-1], 320)
        flat = found.reshape(-1, 320)
        assert all(torch.equal(one(row[None])[0], flat[at]) for at, row in enumerate(rows.reshape(-1, 96)))


def test_two_processes_have_packed_weights_in_memory_once_and_no_others(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    program = Path(__file__).parents[1] / "_weight_memory.py"
    command = [sys.executable, str(program), str(tmp_path / "model"), "packed"]
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr
    alone, both, unpacked = json.loads(done.stdout)["packed"]
    assert 38 * MB < alone < 50 * MB
    assert both <= 1.1 * alone
    assert unpacked < 5 * MB  # half of the embedding, which both have


@pytest.mark.parametrize("room", [0, ROOM])
def test_a_head_that_is_also_the_embedding_is_packed_only_with_room_for_both(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All linears together never fit: otherwise they would have a private copy."""
    folder = saved(tmp_path, tie_word_embeddings=True)
    plain, model = load(folder), load(folder)
    assert model._model.lm_head.weight is model._model.model.embed_tokens.weight
    monkeypatch.setattr("distkv_dask.worker.model.loaded.packable_bytes", lambda _: ROOM + 1)
    model.pack(room, MOST, chosen)
    assert isinstance(vars(model._model.lm_head).get("forward"), FewRowsLinear) == bool(room)
    assert isinstance(model._model.model.layers[0].mlp.up_proj.forward, FewRowsLinear)
    assert ("linears (but 1, which would be in memory twice) packed" in model.where) == (not room)
    assert_close(logits(model, 3), logits(plain, 3))


def test_private_weights_are_not_packed_beside_themselves(tmp_path: Path, cache: Path) -> None:
    """A small checkpoint that is converted is in memory of each process."""
    model = load_model(saved(tmp_path, dtype=torch.float32), "bfloat16", 1)
    model.pack(0, MOST, chosen)
    assert not model.is_packed
    assert not files(cache)


@pytest.mark.parametrize("case", ["rows", "float32", "float16", "onednn"])
def test_nothing_is_packed_where_the_core_does_not_serve_all_steps(
    case: str, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    by = Choice(onednn=True) if case == "onednn" else CHOICE
    dtype = getattr(torch, case) if "float" in case else torch.bfloat16
    model = load(saved(tmp_path, dtype=dtype))
    before = logits(model, 3)
    model.pack(0, MOST + (case == "rows"), lambda: by)
    assert not model.is_packed
    assert torch.equal(logits(model, 3), before)
    assert "packed" not in model.where
    assert not files(cache)
    assert (f"up to {MOST} rows here, and steps have up to {MOST + 1}" in caplog.text) == (case == "rows")


@pytest.mark.parametrize("trouble", ["disk full", "no folder", "lock held", "damaged", "others"])
def test_trouble_with_the_file_costs_speed_only(
    trouble: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(tmp_path)
    model = load(folder)
    before = logits(model, 3)
    lock, says = FileLock(tmp_path / "other"), ""
    if trouble == "disk full":
        disk = host_files.shutil.disk_usage(tmp_path)._replace(total=1000, free=77)
        monkeypatch.setattr(host_files.shutil, "disk_usage", lambda _: disk)
        says = "77 of 1000 bytes are free"
    elif trouble == "no folder":
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        says = "set XDG_CACHE_HOME"
    else:
        load(folder).pack(0, MOST, chosen)
        (file,) = files(cache)
        if trouble == "lock held":
            monkeypatch.setattr(packed_file, "WAIT", 0.01)
            lock, says = FileLock(host_files.lock_of(file)), f"has held {file}.lock"
        elif trouble == "damaged":
            file.write_bytes(file.read_bytes()[:-1])
            says = f"{file} is damaged"
        else:
            other = load(saved(tmp_path, "qwen2"))
            other.pack(0, MOST, chosen)
            (another,) = [one for one in files(cache) if one != file]
            another.replace(file)
            says = f"{file} has other weights: delete it"
    with lock:
        model.pack(0, MOST, chosen)
    assert not model.is_packed
    assert says in caplog.text
    assert "not packed" in caplog.text
    assert torch.equal(logits(model, 3), before)
    assert not [*tmp_path.rglob("*.new")]


def test_what_cannot_be_written_to_the_end_leaves_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, pieces = load(saved(tmp_path)), []

    def fail(weight: Tensor) -> Tensor:
        pieces.append(weight)
        if len(pieces) > 5:
            raise OSError(28, "No space left on device")
        return few_rows.packed(weight)

    monkeypatch.setattr(packed_file, "packed", fail)
    model.pack(0, MOST, chosen)
    assert not model.is_packed
    assert "No space left on device" in caplog.text
    assert [one.suffix for one in cache.iterdir() if one.suffix != ".lock"] == []


def test_other_weights_and_other_layers_have_other_files(tmp_path: Path, cache: Path) -> None:
    folder = saved(tmp_path)
    whole, half = load(folder), load(folder, Stage(1, 2))
    whole.pack(0, MOST, chosen)
    half.pack(0, MOST, chosen)
    assert len(files(cache)) == 2
    assert files(cache)[0].stat().st_size != files(cache)[1].stat().st_size
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1  # which no sample of the fingerprint shows
    model.save_pretrained(folder)
    changed = load(folder)
    assert changed.fingerprint == whole.fingerprint
    changed.pack(0, MOST, chosen)
    assert len(files(cache)) == 3
    assert not torch.equal(logits(changed, 3), logits(whole, 3))


def test_the_file_of_the_model_itself_is_not_deleted_for_room(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distkv_dask.worker.model.host_copy.LEAST", 1)
    folder = saved(tmp_path, dtype=torch.float32)
    load_model(saved(tmp_path, "qwen2", torch.float32), "bfloat16", 1)
    model = load_model(folder, "bfloat16", 1)
    assert len(files(cache)) == 2
    disk = host_files.shutil.disk_usage(cache)._replace(free=0)
    monkeypatch.setattr(host_files, "FREE", 0.1)
    monkeypatch.setattr(host_files.shutil, "disk_usage", lambda _: disk)
    model.pack(0, MOST, chosen)
    assert [str(one) for one in files(cache)] == [model.weights.where.removeprefix("mapped from ")]


def test_usual_rows_are_those_of_chunks_and_batches() -> None:
    assert usual_rows(Config.load()) == 512
    assert usual_rows(Config.load(prefill_chunk_tokens=32, window_batch=64)) == 64
    assert usual_rows(Config.load(window_batch=300, speculation=2)) == 900
    assert usual_rows(Config.load(window_batch=300, speculation="auto")) == 512


def test_an_engine_whose_linears_exceed_the_room_answers_with_mapped_ones(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, prompt = saved(tmp_path), prompt_ids(20)
    settings: dict[str, Any] = {"kv_memory": "2 MiB", "block_tokens": 8, "prefill_chunk_tokens": 16, "window_batch": 8}
    wanted = SamplingParams(max_new_tokens=10, ignore_eos=True)
    found: dict[int, Any] = {}

    for room in (ROOM, 0):
        monkeypatch.setattr("distkv_dask.worker.model.packed.packing_room", lambda _, room=room: room)

        @engine_test(workers=1)
        async def run(client: Client, scheduler: Scheduler, worker: Worker, room: int = room) -> None:
            async with Engine(client, folder, **settings) as engine:
                (status,) = (await engine.status()).workers.values()
                found[room] = status.weights, (await engine.submit(prompt, wanted)).token_ids

        run()
    assert "of this process alone" in found[ROOM][0]
    assert f"packed, mapped from {files(cache)[0]}" in found[0][0]
    assert found[0][1] == found[ROOM][1]
