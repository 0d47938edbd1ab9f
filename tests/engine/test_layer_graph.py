"""One task per layer and holder: the tokens of fused gangs and of plain transformers, and nothing left behind."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, Scheduler, Worker

from distkv_dask import DistKVError, Engine, SamplingParams
from distkv_dask.config import Config
from distkv_dask.errors import CapacityError, ConfigError, GangAbortedError, MissingProgramError
from distkv_dask.gang import DecodeWindow, Gang, PrefillChunk
from distkv_dask.graphs.build import window_graph
from distkv_dask.graphs.layers import layer_prefill_graph, layer_window_graph
from distkv_dask.placement import Endpoint
from distkv_dask.scheduler.commands import AddHolders
from distkv_dask.scheduler.tasks.lowering import lower
from distkv_dask.worker.by_layer import tasks as layer_tasks
from distkv_dask.worker.by_layer.paused import PausedForward
from distkv_dask.worker.tensor_message import TensorMessage
from tests._cluster import engine_test
from tests._models import model_dir, prompt_ids, reference_generate
from tests._splits import force_split

NEW = 6
GREEDY = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
LONG = SamplingParams(max_new_tokens=900, ignore_eos=True)
TINY: dict[str, Any] = {"dtype": "float32", "kv_memory": "4 MiB", "block_tokens": 8, "prefill_chunk_tokens": 64}

SPLITS: dict[str, list[tuple[int, int | None]]] = {
    "one worker": [(0, None)],
    "one token far away": [(1, 1), (0, None)],
    "a tail of one token": [(0, 107), (1, None)],
    "output crosses a border": [(0, 60), (1, 43), (2, None)],
    "an empty span, four workers": [(3, 40), (2, 0), (1, 33), (0, None)],
}
"""Worker and room of each span; None is the rest."""


def tiny(client: Client, family: str = "llama-gqa", **settings: object) -> Engine:
    return Engine(client, str(model_dir(family)), **(TINY | {"granularity": "layer"} | settings))


def nothing_is_paused(engine: Engine, workers: tuple[Worker, ...]) -> bool:
    return not any(worker.plugins["distkv"].engines[engine.id].runtime.paused for worker in workers)


# Tokens


@pytest.mark.parametrize("split_name", SPLITS)
@pytest.mark.parametrize("family", ["llama-gqa", "llama-mqa", "qwen3-moe"])
def test_any_split_gives_the_tokens_of_both_the_fused_gang_and_one_process(
    family: str, split_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompt_ids(100, seed=4)
    new = SamplingParams(max_new_tokens=9, ignore_eos=True)
    expected = reference_generate(model_dir(family), [prompt], 9)[0].tokens

    @engine_test(workers=force_split(SPLITS[split_name], monkeypatch))
    async def run(client: Client, scheduler: Scheduler, *them: Worker) -> None:
        for granularity in ("layer", "window"):
            async with tiny(client, family, granularity=granularity, block_tokens=1) as engine:
                done = await engine.generate([prompt], new)
                assert list(done[0].token_ids) == expected, granularity

    run()


@engine_test(workers=3)
async def test_requests_with_other_holders_join_a_running_batch_and_change_nobodys_tokens(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    lengths, news = [150, 3, 140, 40], [14, 5, 8, 9]
    prompts = [prompt_ids(length, seed=length) for length in lengths]
    expected = [
        reference_generate(model_dir("llama-gqa"), [prompt], new)[0].tokens
        for prompt, new in zip(prompts, news, strict=True)
    ]
    async with tiny(client, kv_memory="384 KiB") as engine:  # 128 tokens on each worker
        running = []
        for prompt, new in zip(prompts, news, strict=True):
            running.append(engine.submit(prompt, SamplingParams(max_new_tokens=new, ignore_eos=True)))
            await asyncio.sleep(0.05)
        done = [await one for one in running]
        assert [list(one.token_ids) for one in done] == expected
        assert any(len(one.placement) > 1 for one in done)


@engine_test(workers=2)
async def test_a_seeded_draw_is_the_same_at_both_granularities(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    drawn = SamplingParams(max_new_tokens=NEW, temperature=0.8, top_p=0.9, seed=5, ignore_eos=True)
    answers = []
    for granularity in ("layer", "window"):
        async with tiny(client, granularity=granularity, kv_memory="256 KiB") as engine:
            answers.append((await engine.submit(prompt_ids(100), drawn)).token_ids)
    assert answers[0] == answers[1]


@engine_test(workers=2)
async def test_bfloat16_queries_survive_the_journey(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
    async with tiny(client, dtype="bfloat16", kv_memory="128 KiB") as engine:
        done = await engine.submit(prompt_ids(100), GREEDY)
        assert len(done.placement) == 2
        assert done.finish_reason == "length"


# Failures


@engine_test(workers=2)
async def test_a_holder_that_fails_once_costs_a_retry_and_one_that_always_fails_its_request(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    prompt = prompt_ids(100)
    expected = reference_generate(model_dir("llama-gqa"), [prompt], NEW)[0].tokens
    compute, calls, failing = layer_tasks.attend_part, [0], {7: GangAbortedError("a fault of this test")}

    def sometimes(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] in failing or -1 in failing:
            raise failing.get(calls[0]) or failing[-1]
        return compute(*args)

    layer_tasks.attend_part = sometimes
    try:
        async with tiny(client, kv_memory="256 KiB") as engine:
            assert list((await engine.submit(prompt, GREEDY)).token_ids) == expected
            assert calls[0] > 7
            failing[-1] = ValueError("another fault of this test")  # type: ignore[assignment]
            with pytest.raises(DistKVError, match="another fault of this test"):
                await engine.submit(prompt, GREEDY)
            for _ in range(100):
                if nothing_is_paused(engine, workers):
                    break
                await asyncio.sleep(0.05)
            assert nothing_is_paused(engine, workers)
            failing.clear()
            assert list((await engine.submit(prompt, GREEDY)).token_ids) == expected
    finally:
        layer_tasks.attend_part = compute


@engine_test(workers=2)
async def test_partials_that_never_come_end_the_forward_in_time(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    compute, late = layer_tasks.attend_part, [0.4]

    def slow(*args: Any) -> Any:
        time.sleep(late[0])
        return compute(*args)

    layer_tasks.attend_part = slow
    try:
        limits = {"timeout_start": "200 ms", "timeout_receive": 1}  # the second one also limits retries
        async with tiny(client, kv_memory="256 KiB", **limits) as engine:
            with pytest.raises(DistKVError, match=r"no partials of layer 0.*distkv\.timeouts\.start"):
                await engine.submit(prompt_ids(100), GREEDY)
            late[0] = 0.0
            assert (await engine.submit(prompt_ids(100), GREEDY)).finish_reason == "length"
    finally:
        layer_tasks.attend_part = compute


@engine_test(workers=2)
async def test_cancelling_and_closing_in_the_middle_leave_nothing(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    async with tiny(client, window_steps=4) as engine:
        cancelled, closed = engine.submit(prompt_ids(600), LONG), engine.submit(prompt_ids(20), LONG)
        while (await engine.status()).totals.get("decode_steps", 0) < 3:
            assert not cancelled.done()
            await asyncio.sleep(0.02)
        cancelled.cancel()
        for _ in range(100):
            if len((await engine.status()).sequences) == 1:
                break
            await asyncio.sleep(0.05)
        assert len((await engine.status()).sequences) == 1
        assert not closed.done()
    assert closed.cancelled()


def test_answers_that_nobody_waits_for_are_refused() -> None:
    forward = PausedForward(gang(), limit=0.01)
    forward.ask(0, TensorMessage(None, ()))
    forward.answer(0, [])
    with pytest.raises(GangAbortedError, match="layer 0"):
        forward.answer(0, [])
    with pytest.raises(GangAbortedError, match="layer 1"):
        forward.answer(1, [])
    forward.abort("a reason")
    with pytest.raises(GangAbortedError, match="a reason"):
        forward.wait_for_answers(0)
    forward.end()
    assert forward.question(1) is None


# The graph


def gang(name: str = "decode-1", holders: int = 2) -> Gang:
    return Gang("engine", 1, name, 1, "home", tuple(Endpoint(f"w{at}", "127.0.0.1", at) for at in range(holders)))


def test_a_step_is_one_pinned_task_per_layer_and_one_per_layer_and_holder_each_after_what_it_needs() -> None:
    graph = layer_window_graph(DecodeWindow(gang(), 0, 64, 1.0), 3)
    assert set(graph.tasks) == {
        "decode-1",
        *(f"layer-decode-1-{at}" for at in range(3)),
        *(f"attend-decode-1-{at}@w{holder}" for at in range(3) for holder in range(2)),
    }
    for key, worker in graph.workers.items():
        assert worker == (key.split("@")[1] if "@" in key else "home")
    for key, dependencies in {
        "layer-decode-1-0": [],
        "attend-decode-1-1@w0": ["layer-decode-1-1"],
        "layer-decode-1-2": ["layer-decode-1-1", "attend-decode-1-1@w0", "attend-decode-1-1@w1"],
        "decode-1": ["layer-decode-1-2", "attend-decode-1-2@w0", "attend-decode-1-2@w1"],
    }.items():
        assert [part for part in graph.tasks[key] if isinstance(part, str)] == dependencies
    assert graph.tasks["layer-decode-1-0"][1].steps == 1, "the graph of a window is the graph of a step"


def test_chunks_and_windows_follow_each_other() -> None:
    chunks = [PrefillChunk(gang(f"prefill-{at}", at), 0, (), 8 * at, (1, 2)) for at in range(2)]
    graph = layer_prefill_graph(chunks, 2)
    assert graph.tasks["layer-prefill-1-0"][-1].target == "prefill-0"
    assert len(graph.tasks) == 3 + 3 + 2
    after = layer_window_graph(DecodeWindow(gang("decode-2"), 0, 1, 1.0), 2, after=gang("decode-1"))
    assert after.tasks["layer-decode-2-0"][-1].target == "decode-1"


def test_holders_are_added_to_queued_gangs_and_never_to_graphs_of_layers() -> None:
    command = AddHolders(gang(), gang().holders)
    assert len(lower(command, "window", 3)[0].tasks) == 2
    assert not lower(command, "layer", 3)[0].tasks


@engine_test(workers=3)
async def test_a_user_sees_the_graph_of_a_step_before_anything_runs(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    async with tiny(client, kv_memory="128 KiB") as engine:  # 40 tokens on each worker
        fine = await engine.graph(prompt_ids(100), GREEDY)
        assert len(fine.tasks) == 3 + 2 * 3 + 1
        assert set(fine.workers.values()) == {worker.address for worker in workers}
        coarse = await engine.graph(prompt_ids(100), GREEDY, granularity="window")
        assert len(coarse.tasks) == 3
        assert len(coarse.channels) == 2
        with pytest.raises(ConfigError, match="one of window, layer"):
            await engine.graph(prompt_ids(100), GREEDY, granularity="token")
        with pytest.raises(CapacityError, match="free now"):
            await engine.graph(prompt_ids(400), GREEDY)


def test_a_drawing_shows_every_task_with_its_worker(tmp_path: Path) -> None:
    pytest.importorskip("graphviz")
    if shutil.which("dot") is None:
        pytest.skip("graphviz is not installed")
    window = DecodeWindow(gang("step"), 0, 1, 1.0)
    layer_window_graph(window, 2).visualize(str(tmp_path / "layer.svg"))
    drawn = (tmp_path / "layer.svg").read_text().replace("&#45;", "-")
    assert all(words in drawn for words in ["layer-step-1", "attend-step-0", "home", "w1"])
    window_graph(window).visualize(str(tmp_path / "window.svg"))
    assert (tmp_path / "window.svg").read_text().count("channel") == 2


def test_without_a_program_to_draw_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingProgramError, match="conda install python-graphviz"):
        window_graph(DecodeWindow(gang("step"), 0, 1, 1.0)).visualize()


def test_window_is_the_default() -> None:
    assert Config.load().granularity == "window"
