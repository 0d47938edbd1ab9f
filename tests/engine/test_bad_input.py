"""Every mistake gives a clear error of ours as early as possible, and the engine still serves the next request."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, Scheduler, SchedulerPlugin, Worker

from distkv_dask import (
    CapacityError,
    ClusterError,
    ConfigError,
    Engine,
    EngineClosedError,
    InvalidRequestError,
    ModelError,
    SamplingParams,
    UnsupportedModelError,
)
from distkv_dask.errors import DeviceError
from tests._cluster import engine_test, gen_cluster
from tests._models import VOCAB, model_dir, prompt_ids, text_model_dir

TINY: dict[str, Any] = {"dtype": "float32", "kv_memory": "1 MiB", "block_tokens": 8, "prefill_chunk_tokens": 32}
TWO = SamplingParams(max_new_tokens=2, ignore_eos=True)


@engine_test()
async def test_bad_prompts_are_refused_and_good_ones_beside_them_are_served(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    async with Engine(client, str(model_dir("llama-gqa")), **TINY) as engine:
        for prompt, words in [
            ([], "empty"),
            ([1, VOCAB], f"0 to {VOCAB - 1}"),
            ([1, -1], "out of the model's vocabulary"),
            ([1, "two"], "token id is an integer"),
            (7, "a prompt is"),
            ("text", "no tokenizer"),
            ([{"role": "user", "content": "hello"}], "no chat template"),
        ]:
            with pytest.raises(InvalidRequestError, match=words):
                engine.submit(prompt)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError, match="max_new_tokens"):
            SamplingParams(max_new_tokens=-1)
        with pytest.raises(InvalidRequestError, match="window of 4096 tokens"):
            engine.submit(prompt_ids(4090), SamplingParams(max_new_tokens=10))
        with pytest.raises(InvalidRequestError, match="2 prompts, but 3"):
            await engine.generate([[1], [2]], [TWO, TWO, TWO])
        done = await engine.generate([[], prompt_ids(5), [VOCAB]], TWO)
        assert [one.finish_reason for one in done] == ["error", "length", "error"]
        assert "empty" in (done[0].error or "")
        assert len(done[1].token_ids) == 2


@engine_test()
async def test_half_a_surrogate_pair_is_that_prompts_error_and_nothing_stays_behind(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    half = "half \ud83d"
    async with Engine(client, str(text_model_dir()), **TINY) as engine:
        done = await engine.generate(["whole", half, [{"role": "user", "content": half}], "whole"], TWO)
        assert [one.finish_reason for one in done] == ["length", "error", "error", "length"]
        assert "character 5" in (done[1].error or "")
        for refused in (
            lambda: engine.submit(half),
            lambda: engine.stream(half),
            lambda: engine.submit("x", SamplingParams(stop=half)),
        ):
            with pytest.raises(InvalidRequestError, match="surrogate"):
                refused()
        for source, name in ((half, None), ("whole", half), ("whole", "a\nb"), ("whole", "")):
            with pytest.raises(InvalidRequestError, match=r"surrogate|name"):
                await engine.ingest(source, name)
        async with await engine.ingest("whole") as document:
            answers = await document.ask(["more?", half], TWO)
            assert [one.finish_reason for one in answers] == ["length", "error"]
            async with document.chat() as chat:
                with pytest.raises(InvalidRequestError, match="surrogate"):
                    await chat.ask(half, TWO)
                assert (await chat.ask("more?", TWO)).finish_reason == "length"


@engine_test()
async def test_a_prompt_larger_than_all_pools_is_refused_at_once_with_figures_and_the_setting(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    async with Engine(client, str(model_dir("llama-gqa")), **TINY) as engine:
        tokens = 3 * (2**20 // 3072) + 10
        with pytest.raises(CapacityError, match=r"needs \d+ bytes.*workers.*have 3\d+ bytes.*kv-memory"):
            await engine.submit(prompt_ids(tokens), TWO)
        done = await engine.generate([prompt_ids(tokens), prompt_ids(9)], TWO)
        assert [one.finish_reason for one in done] == ["error", "length"]


@engine_test(workers=2)
async def test_a_burst_that_does_not_fit_together_finishes_in_turn(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    async with Engine(client, str(model_dir("llama-gqa")), **TINY) as engine:
        done = await engine.generate([prompt_ids(200, seed=seed) for seed in range(20)], TWO)
        assert [one.finish_reason for one in done] == ["length"] * 20


@gen_cluster(client=True, nthreads=[("127.0.0.1", 1)], timeout=60)
async def test_an_engine_that_cannot_be_opened_says_why(client: Client, scheduler: Scheduler, worker: Worker) -> None:
    model = str(model_dir("llama-gqa"))
    with pytest.raises(CapacityError, match=r"one block of 8 tokens.*needs 24576.*block-tokens"):
        await Engine(client, model, **(TINY | {"kv_memory": 1000}))
    too_much = worker.memory_manager.memory_limit * 2
    with pytest.raises((CapacityError, DeviceError), match=r"does not fit (the machine of )?(worker|Emulated GPU)"):
        await Engine(client, model, **(TINY | {"kv_memory": too_much}))
    with pytest.raises(ConfigError, match=r"distkv\.kv-memory"):
        Engine(client, model, **(TINY | {"kv_memory": "many"}))
    with pytest.raises(ConfigError, match="window_steps"):
        Engine(client, model, window_step=3)
    with pytest.raises(ModelError, match="no-such-model"):
        Engine(client, "no-such-model")
    with pytest.raises(ModelError, match="float32"):
        await Engine(client, model, dtype="float99")
    async with Engine(client, model, **TINY) as engine:  # after all that, a good one opens
        assert (await engine.generate([prompt_ids(9)], TWO))[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("mistral", {"index_topk": 64}, "sparse attention"),
        ("llama-gqa", {"alibi": True}, "ALiBi"),
    ],
)
def test_a_model_with_attention_that_we_do_not_compute_is_refused(
    family: str, change: dict[str, object], words: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_dir(family), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))

    @gen_cluster(client=True, nthreads=[("127.0.0.1", 1)], timeout=60)
    async def run(client: Client, scheduler: Scheduler, worker: Worker) -> None:
        with pytest.raises(UnsupportedModelError, match=words):
            await Engine(client, str(folder), **TINY)

    run()


@gen_cluster(client=True, nthreads=[], timeout=60)
async def test_a_cluster_without_workers_is_an_error_that_says_how_to_get_some(
    client: Client, scheduler: Scheduler
) -> None:
    with pytest.raises(ClusterError, match=r"cluster\.scale"):
        await Engine(client, str(model_dir("llama-gqa")), **TINY)


class Impostor(SchedulerPlugin):
    """Replaces the gManager, like one that failed to start."""


@gen_cluster(client=True, nthreads=[("127.0.0.1", 1)], timeout=60)
async def test_a_gmanager_that_failed_to_start_is_an_error_that_says_where_to_look(
    client: Client, scheduler: Scheduler, worker: Worker
) -> None:
    await client.register_plugin(Impostor(), name="distkv")
    with pytest.raises(ClusterError, match="scheduler"):
        await Engine(client, str(model_dir("llama-gqa")), **TINY)


@gen_cluster(client=True, nthreads=[("127.0.0.1", 1)], timeout=60)
async def test_an_rmanager_that_fails_to_start_names_the_worker(
    client: Client, scheduler: Scheduler, worker: Worker
) -> None:
    worker.stream_handlers = None  # breaks what the rManager needs
    with pytest.raises(ClusterError, match=worker.address):
        await Engine(client, str(model_dir("llama-gqa")), **TINY)


@engine_test(workers=1)
async def test_a_closed_engine_says_so(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
    engine = Engine(client, str(model_dir("llama-gqa")), **TINY)
    with pytest.raises(EngineClosedError, match="await"):
        engine.submit([1])
    await engine
    await engine.close()
    with pytest.raises(EngineClosedError, match="closed"):
        engine.submit([1])
