"""A JSON schema that takes long to compile does not delay requests that decode on the same worker."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from distributed import Client, Scheduler, Worker

pytest.importorskip("llguidance", reason="llguidance is not installed (extra: schema)")

from distkv_dask import Engine, SamplingParams
from distkv_dask.worker.model import structured
from tests._cluster import engine_test
from tests._models import prompt_ids, text_model_dir

TINY: dict[str, Any] = {"dtype": "float32", "kv_memory": "16 MiB", "block_tokens": 8, "window_steps": 2}
SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 40, "maxItems": 50}
NEIGHBOUR = SamplingParams(max_new_tokens=1500, ignore_eos=True)
STRUCTURED = SamplingParams(max_new_tokens=400, schema=SCHEMA)


class Slow:
    """A compiler that continues when a test says so; work that ends before was not delayed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began, self.may_go_on = threading.Event(), threading.Event()
        self._compile = structured.grammar_of
        monkeypatch.setattr(structured, "grammar_of", self)

    def __call__(self, schema: str) -> str:
        self.began.set()
        assert self.may_go_on.wait(60), "nobody else went on"
        return self._compile(schema)


def after_the_prompt(monkeypatch: pytest.MonkeyPatch, then: Callable[[], object]) -> None:
    """Forget compiled schemas when the prompt is computed, as if another worker had done that, and call ``then``."""
    follow, prompts = structured.Grammars.follow, iter([True])

    def follow_and_forget(grammars: structured.Grammars, *given: Any) -> structured.Follower:
        follower = follow(grammars, *given)
        if next(prompts, False):
            grammars._made = {}
            then()
        return follower

    monkeypatch.setattr(structured.Grammars, "follow", follow_and_forget)


async def generated(engine: Engine, number: int) -> int:
    sequences = (await engine.status()).sequences
    return sequences[number].generated_tokens if number in sequences else 0


async def goes_on(engine: Engine, number: int) -> None:
    """Wait until two more windows of a request have ended."""
    before = await generated(engine, number)
    while (now := await generated(engine, number)) < before + 2 * TINY["window_steps"] + 1:
        assert now >= before, "it has ended"
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("granularity", ["window", "layer"])
def test_a_neighbour_decodes_while_the_schema_of_a_new_request_is_compiled(
    granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.collect()  # a model that this process still has would be shared, with its compiled schemas

    @engine_test(workers=1)
    async def run(client: Client, scheduler: Scheduler, worker: Worker) -> None:
        async with Engine(client, str(text_model_dir(end=True)), granularity=granularity, **TINY) as engine:
            neighbour = engine.submit(prompt_ids(20), NEIGHBOUR)
            await goes_on(engine, 0)
            slow = Slow(monkeypatch)
            asked = engine.submit(prompt_ids(30, seed=1), STRUCTURED)
            assert await asyncio.to_thread(slow.began.wait, 60)
            await goes_on(engine, 0)
            slow.may_go_on.set()
            jsonschema.validate(json.loads((await asked).text), SCHEMA)
            neighbour.cancel()

    run()


@pytest.mark.parametrize("granularity", ["window", "layer"])
def test_a_neighbour_decodes_while_a_schema_is_compiled_for_a_request_whose_prompt_another_worker_computed(
    granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @engine_test(workers=1)
    async def run(client: Client, scheduler: Scheduler, worker: Worker) -> None:
        async with Engine(client, str(text_model_dir(end=True)), granularity=granularity, **TINY) as engine:
            await engine.submit(prompt_ids(30), SamplingParams(max_new_tokens=3, schema=SCHEMA))  # takes seconds, once
            neighbour = engine.submit(prompt_ids(20), NEIGHBOUR)
            await goes_on(engine, 1)
            slow: list[Slow] = []
            after_the_prompt(monkeypatch, lambda: slow.append(Slow(monkeypatch)))
            asked = engine.submit(prompt_ids(30, seed=1), STRUCTURED)
            while not slow:
                await asyncio.sleep(0.01)
            assert await asyncio.to_thread(slow[0].began.wait, 60)
            await goes_on(engine, 1)
            slow[0].may_go_on.set()
            jsonschema.validate(json.loads((await asked).text), SCHEMA)
            neighbour.cancel()

    run()


@engine_test(workers=1)
async def test_a_request_that_is_alone_waits_for_its_schema(
    client: Client, scheduler: Scheduler, worker: Worker
) -> None:
    forgotten: list[bool] = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        after_the_prompt(monkeypatch, lambda: forgotten.append(True))
        async with Engine(client, str(text_model_dir(end=True)), **TINY) as engine:
            asked = engine.submit(prompt_ids(30, seed=1), STRUCTURED)
            jsonschema.validate(json.loads((await asked).text), SCHEMA)
    assert forgotten
