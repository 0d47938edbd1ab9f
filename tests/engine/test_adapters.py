"""Adapters by request: whatever else is in its batch, a request has the tokens of transformers with peft."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster, Scheduler, Worker

from distkv_dask import Engine, InvalidRequestError, SamplingParams, SavedDocumentError
from distkv_dask.errors import AdapterError
from tests._cluster import PROTOCOL, client_of_all, decoding, engine_test, until_idle
from tests._models import HYBRIDS, kv_memory, model_dir, prompt_ids, reference_generate

pytest.importorskip("peft")
from tests._adapters import adapted_generate, adapter_dir, save_adapter

NEW = 12
SMALL: dict[str, Any] = {"dtype": "float32", "block_tokens": 8, "prefill_chunk_tokens": 32}
LLAMA = "llama-gqa"


def greedy(adapter: Path | None = None, new: int = NEW, **more: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=new, ignore_eos=True, adapter=adapter, **more)


def expected(family: str, adapter: Path | None, prompt: list[int], new: int = NEW) -> list[int]:
    if adapter is None:
        return reference_generate(model_dir(family), [prompt], new)[0].tokens
    return adapted_generate(model_dir(family), adapter, [prompt], new)[0].tokens


def all_expected(family: str, asked: list[tuple[Path | None, list[int]]]) -> list[list[int]]:
    return [expected(family, adapter, prompt) for adapter, prompt in asked]


TARGETS = {
    LLAMA: ("all", "attention"),
    "qwen3": ("all-linear", "down_proj"),
    "phi3": ("all-linear", "qkv_proj"),
    "gemma2": ("all", "attention"),
    "qwen3-moe": ("attention", "attention"),
    "lfm2": ("all-linear", "in_proj"),
}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        (LLAMA, {}),
        ("qwen3", {"speculation": 2}),
        ("phi3", {"granularity": "layer"}),
        ("gemma2", {}),
        ("qwen3-moe", {}),
        ("lfm2", {}),
        (LLAMA, {"weights": "disk"}),
        (LLAMA, {"deterministic": True}),
        (LLAMA, {"adapters": 1}),
    ],
)
def test_two_adapters_and_the_model_in_one_batch_get_the_tokens_of_peft(family: str, settings: dict[str, Any]) -> None:
    one, two = (adapter_dir(family, seed, targets) for seed, targets in enumerate(TARGETS[family]))
    prompts = [prompt_ids(length, seed=length) for length in (230, 5, 61)]
    asked = [(adapter, prompt) for prompt in prompts for adapter in (one, None, two)]
    wanted = all_expected(family, asked)
    assert len({tuple(tokens) for tokens in wanted}) == len(wanted), "adapters make a difference"

    @engine_test(workers=3)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        memory = "8 MiB" if family in HYBRIDS else kv_memory(family, 36, 4)
        async with Engine(client, str(model_dir(family)), kv_memory=memory, **SMALL | settings) as engine:
            done = await engine.generate([prompt for _, prompt in asked], [greedy(adapter) for adapter, _ in asked])
            assert [one.error for one in done] == [None] * len(done)
            assert [list(one.token_ids) for one in done] == wanted

    run()


@pytest.mark.parametrize("family", [LLAMA, "lfm2"])
def test_kv_of_one_adapter_is_no_beginning_for_another(family: str) -> None:
    one, two = (adapter_dir(family, seed, "all-linear") for seed in range(2))
    prompt = prompt_ids(100, seed=3)

    @engine_test(workers=2)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with Engine(client, str(model_dir(family)), kv_memory="8 MiB", **SMALL) as engine:
            for adapter, reuses in ((one, False), (two, False), (None, False), (one, True), (None, True), (two, True)):
                (done,) = await engine.generate([prompt], greedy(adapter))
                assert list(done.token_ids) == expected(family, adapter, prompt)
                assert (done.reused_tokens > 0) == reuses

    run()


@engine_test(workers=2)
async def test_a_document_belongs_to_its_adapter(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
    one, two = adapter_dir(LLAMA, 0), adapter_dir(LLAMA, 1)
    text, question = prompt_ids(96, seed=5), prompt_ids(9, seed=6)
    whole = [*text, *question]
    async with Engine(client, str(model_dir(LLAMA)), kv_memory="8 MiB", **SMALL) as engine:
        document = await engine.ingest(text, adapter=one)
        plain = await engine.ingest(text)
        for params in (greedy(), greedy(one)):
            done = await document.ask(question, params)
            assert (list(done.token_ids), done.reused_tokens) == (expected(LLAMA, one, whole), 96)
        for asked, wrong in ((document, two), (plain, one)):
            with pytest.raises(InvalidRequestError, match="ingest the document again"):
                await asked.ask(question, greedy(wrong))
        for adapter, reused in ((None, 96), (two, 0), (one, 96)):
            (done,) = await engine.generate([whole], greedy(adapter))
            assert (list(done.token_ids), done.reused_tokens) == (expected(LLAMA, adapter, whole), reused)
        chat = document.chat()
        first = await chat.ask(question, greedy())
        assert list(first.token_ids) == expected(LLAMA, one, whole)
        again = prompt_ids(7, seed=8)
        second = await chat.ask(again, greedy())
        assert list(second.token_ids) == expected(LLAMA, one, [*whole, *first.token_ids, *again])
        await chat.close()
        several = await document.ask(question, greedy(temperature=0.8, n=3, seed=4))
        alone = await engine.submit(whole, greedy(one, temperature=0.8, n=3, seed=4))
        assert [branch.token_ids for branch in several.answers] == [branch.token_ids for branch in alone.answers]


def test_a_saved_document_is_loaded_with_the_adapter_that_it_was_computed_with(tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(adapter_dir(LLAMA, 0), tmp_path / "adapter"))
    text, question = prompt_ids(64, seed=5), prompt_ids(9, seed=6)

    @engine_test(workers=2)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with Engine(client, str(model_dir(LLAMA)), kv_memory="8 MiB", **SMALL) as engine:
            document = await engine.ingest(text, adapter=adapter)
            await document.save(tmp_path / "saved")
            await document.release()
            loaded = await engine.load(tmp_path / "saved")
            done = await loaded.ask(question, greedy())
            assert list(done.token_ids) == expected(LLAMA, adapter_dir(LLAMA, 0), [*text, *question])
            await loaded.release()
            moved = adapter.rename(tmp_path / "moved")
            with pytest.raises(AdapterError, match="no adapter in"):
                await engine.load(tmp_path / "saved")
            await (await engine.load(tmp_path / "saved", adapter=moved)).release()
            shutil.copytree(adapter_dir(LLAMA, 1), adapter)
            with pytest.raises(SavedDocumentError, match="other weights"):
                await engine.load(tmp_path / "saved")

    run()


def test_more_adapters_than_fit_wait_for_each_other(tmp_path: Path) -> None:
    # a model that this process still has would be shared, with the adapters and the limit of its last engine
    model = shutil.copytree(model_dir(LLAMA), tmp_path / "model")

    @engine_test(workers=2)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        adapters = [adapter_dir(LLAMA, seed) for seed in range(4)]
        asked = [(adapter, prompt_ids(20 + at, seed=at)) for at in range(3) for adapter in [*adapters, None]]
        settings = SMALL | {"adapters": 2, "window_steps": 4}
        async with Engine(client, str(model), kv_memory="8 MiB", **settings) as engine:
            running = []
            for adapter, prompt in asked:
                running.append(engine.submit(prompt, greedy(adapter)))
                await asyncio.sleep(0.02)
            done = [await one for one in running]
            assert [list(one.token_ids) for one in done] == all_expected(LLAMA, asked)
            for one in (await until_idle(engine)).workers.values():
                assert 0 < len(one.adapters) <= 2
                assert {*one.adapters} <= {str(adapter) for adapter in adapters}
                assert one.adapter_bytes == len(one.adapters) * 99840

    run()


def _changed(source: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(config | changes))
    return target


def _bad(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    good = adapter_dir(LLAMA, 0)
    yield tmp_path / "nowhere", "there is no adapter"
    yield _changed(good, tmp_path / "dora", use_dora=True), "DoRA"
    yield _changed(good, tmp_path / "saved", modules_to_save=["lm_head"]), "whole modules"
    yield _changed(good, tmp_path / "pissa", init_lora_weights="pissa"), "init_lora_weights"
    yield _changed(good, tmp_path / "experts", target_parameters=["mlp.experts.gate_up_proj"]), "such as experts"
    yield _changed(good, tmp_path / "future", something_new=3), "something_new"
    yield _changed(good, tmp_path / "ia3", peft_type="IA3"), "only LORA"
    yield _changed(good, tmp_path / "fewer", target_modules=["q_proj"]), "name no such linear layer"
    yield _changed(good, tmp_path / "rank", r=8), "of rank 4"
    yield _changed(good, tmp_path / "none", target_modules=["nothing_like_it"]), "does not fit the model"
    yield _changed(good, tmp_path / "more", target_modules=["q_proj", "lm_head"]), "model's head"
    yield adapter_dir("qwen3", 0, "attention"), "for another model"
    cut = Path(shutil.copytree(good, tmp_path / "cut")) / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    yield cut.parent, "damaged or cut short"
    pickled = Path(shutil.copytree(good, tmp_path / "pickled"))
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    yield pickled, "pickled"


def test_a_bad_adapter_is_refused_by_name_and_the_engine_goes_on(tmp_path: Path) -> None:
    prompt = prompt_ids(30)

    @engine_test(workers=2)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with Engine(client, str(model_dir(LLAMA)), kv_memory="8 MiB", **SMALL) as engine:
            for place, words in _bad(tmp_path):
                beside = engine.submit(prompt, greedy())
                with pytest.raises(AdapterError, match=words):
                    await engine.submit(prompt, greedy(place))
                assert list((await beside).token_ids) == expected(LLAMA, None, prompt)
            status = await until_idle(engine)
            assert all(one.used_blocks == 0 for one in status.workers.values())

    run()


def test_a_layer_that_is_computed_in_another_way_takes_no_adapter(tmp_path: Path) -> None:
    adapter = save_adapter(model_dir("deepseek-v3"), tmp_path / "adapter", 0, "kv_b_proj")

    @engine_test(workers=1)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with Engine(client, str(model_dir("deepseek-v3")), kv_memory="8 MiB", **SMALL) as engine:
            with pytest.raises(AdapterError, match="does not compute as linear"):
                await engine.submit(prompt_ids(30), greedy(adapter))

    run()


@engine_test(workers=2)
async def test_stages_take_no_adapters(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
    async with Engine(client, str(model_dir(LLAMA)), kv_memory="2 MiB", stages=2, **SMALL) as engine:
        with pytest.raises(InvalidRequestError, match=r"distkv\.stages is 2"):
            engine.submit(prompt_ids(9), greedy(adapter_dir(LLAMA, 0)))


@pytest.mark.slow
@pytest.mark.thorough
def test_a_killed_home_costs_a_request_with_an_adapter_no_token() -> None:
    adapter, new, prompt = adapter_dir(LLAMA, 0), 300, prompt_ids(900)
    settings = SMALL | {"window_steps": 4}
    with (
        LocalCluster(n_workers=3, threads_per_worker=1, protocol=PROTOCOL, dashboard_address=None) as cluster,
        client_of_all(cluster) as client,
        Engine(client, str(model_dir(LLAMA)), kv_memory="2 MiB", **settings) as engine,
    ):
        wide = engine.submit(prompt, greedy(adapter, new))
        home = decoding(engine)[0].placement[-1].worker
        os.kill(client.run(os.getpid, workers=[home])[home], signal.SIGKILL)
        assert list(wide.result(120).token_ids) == expected(LLAMA, adapter, prompt, new)
