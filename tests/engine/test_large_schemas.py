"""A JSON schema that takes long to compile does not delay requests that decode on the same worker."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from typing import Any

import jsonschema
import pytest
from distributed import Client, Scheduler, Worker

pytest.importorskip("llguidance", reason="llguidance is not installed (extra: schema)")

from distkv_dask import Engine, SamplingParams
from distkv_dask.client.session.generation import Generation
from distkv_dask.worker.model import structured
from tests._cluster import engine_test
from tests._models import prompt_ids, text_model_dir

TINY: dict[str, Any] = {"dtype": "float32", "kv_memory": "4 MiB", "block_tokens": 8, "window_steps": 2}
# Many tokens: an answer of ten ended before a test on a fast machine had seen that it began.
SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 40, "maxItems": 50}
NEIGHBOUR = SamplingParams(max_new_tokens=600, ignore_eos=True)
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


async def generated(engine: Engine, number: int) -> int:
    sequences = (await engine.status()).sequences
    return sequences[number].generated_tokens if number in sequences else 0


async def begins(engine: Engine, number: int, asked: Generation) -> None:
    """Wait until an answer has begun."""
    while await generated(engine, number) < 2:
        assert not asked.done(), "the answer ended before it was seen"
        await asyncio.sleep(0.01)


async def goes_on(engine: Engine, number: int) -> None:
    """Wait until two more windows of a request have ended."""
    before = await generated(engine, number)
    while await generated(engine, number) < before + 2 * TINY["window_steps"] + 1:
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
            neighbour = engine.submit(prompt_ids(20), NEIGHBOUR)
            asked = engine.submit(prompt_ids(30, seed=1), STRUCTURED)
            await begins(engine, 1, asked)
            slow = Slow(monkeypatch)
            model = worker.plugins["distkv"].engines[engine.id].model
            model._grammars._made = {}  # as on a worker that only now becomes its home
            assert await asyncio.to_thread(slow.began.wait, 60)
            await goes_on(engine, 0)
            slow.may_go_on.set()
            jsonschema.validate(json.loads((await asked).text), SCHEMA)
            neighbour.cancel()

    run()


@engine_test(workers=1)
async def test_a_request_that_is_alone_waits_for_its_schema(
    client: Client, scheduler: Scheduler, worker: Worker
) -> None:
    async with Engine(client, str(text_model_dir(end=True)), **TINY) as engine:
        asked = engine.submit(prompt_ids(30, seed=1), STRUCTURED)
        await begins(engine, 0, asked)
        worker.plugins["distkv"].engines[engine.id].model._grammars._made = {}
        jsonschema.validate(json.loads((await asked).text), SCHEMA)
