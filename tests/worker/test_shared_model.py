"""Engines of one process share a model's weights for as long as one of them is open."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
from distributed import Client, Scheduler, Worker

from distkv_dask import Engine, SamplingParams
from distkv_dask.errors import ModelError
from distkv_dask.worker.device import HOST
from distkv_dask.worker.model.loaded import LoadedModel
from distkv_dask.worker.model.shared import shared_model
from tests._cluster import engine_test
from tests._models import model_dir, prompt_ids, reference_generate

SMALL: dict[str, Any] = {"dtype": "float32", "kv_memory": "2 MiB", "block_tokens": 8}


def load(folder: Path, dtype: str = "float32", deterministic: bool = False) -> LoadedModel:
    return shared_model(str(folder), dtype, 1, None, deterministic, HOST, "auto", place=lambda: False)


def test_a_model_is_loaded_once_and_freed_with_its_last_user(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_dir("llama-gqa"), tmp_path / "model"))
    first, second = load(folder), load(folder)
    assert first is second
    assert load(folder, "bfloat16") is not first
    assert load(folder, deterministic=True) is not first
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert load(folder) is not first
    gone = ref(first)
    del first, second
    gc.collect()
    assert gone() is None


def test_what_is_refused_before_weights_are_read_is_refused_again(tmp_path: Path) -> None:
    def refuse() -> bool:
        raise ModelError("too large")

    for _ in range(2):
        with pytest.raises(ModelError, match="too large"):
            shared_model(str(model_dir("llama-mqa")), "float16", 1, None, False, HOST, "auto", place=refuse)


@engine_test(workers=1)
async def test_two_engines_with_one_model_answer_as_one(client: Client, scheduler: Scheduler, worker: Worker) -> None:
    prompts = [prompt_ids(40, seed=1), prompt_ids(30, seed=2)]
    expected = [one.tokens for one in reference_generate(model_dir("llama-gqa"), prompts, 10)]
    wanted = SamplingParams(max_new_tokens=10, ignore_eos=True)
    async with Engine(client, str(model_dir("llama-gqa")), **SMALL) as one:
        async with Engine(client, str(model_dir("llama-gqa")), **SMALL) as other:
            engines = worker.plugins["distkv"].engines
            assert engines[one.id].model is engines[other.id].model
            running = [one.submit(prompts[0], wanted), other.submit(prompts[1], wanted)]
            assert [list((await done).token_ids) for done in running] == expected
        done = await one.submit(prompts[1], wanted)
        assert list(done.token_ids) == expected[1]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A model that no other test of this process has."""
    return Path(shutil.copytree(model_dir("llama-gqa"), tmp_path / "model"))


def test_the_model_is_freed_when_its_last_engine_closes(own: Path) -> None:
    @engine_test(workers=1)
    async def run(client: Client, scheduler: Scheduler, worker: Worker) -> None:
        async with Engine(client, str(own), **SMALL) as engine:
            used = ref(worker.plugins["distkv"].engines[engine.id].model)
            await engine.submit(prompt_ids(20), SamplingParams(max_new_tokens=4))
            assert used() is not None
        for _ in range(500):  # the thread of its last task may not have returned yet
            if used() is None:
                break
            await asyncio.sleep(0.01)
        assert used() is None

    gc.collect()
    gc.disable()  # Python may not look for cycles for minutes
    try:
        run()
    finally:
        gc.enable()


@pytest.mark.parametrize("deterministic", [False, True])
def test_weights_are_freed_with_their_model(own: Path, deterministic: bool) -> None:
    model: Any = load(own, deterministic=deterministic)
    used = [ref(weight) for weight in model._model.parameters()]
    gc.collect()
    gc.disable()
    try:
        del model
        assert not any(weight() is not None for weight in used)
    finally:
        gc.enable()
