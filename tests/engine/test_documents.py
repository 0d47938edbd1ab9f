"""Documents: ingested once, asked about often, with the tokens of separate requests and of plain transformers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from distributed import Client, LocalCluster, Scheduler, Worker

from distkv_dask import (
    CapacityError,
    Completion,
    Document,
    Engine,
    EngineClosedError,
    EngineStatus,
    InvalidRequestError,
    SamplingParams,
    SourceError,
)
from tests._cluster import engine_test, until_idle
from tests._models import block_bytes, model_dir, prompt_ids, reference_generate
from tests._splits import force_split

SMALL = {"dtype": "float32", "block_tokens": 8, "prefill_chunk_tokens": 32}
NEW = 10
GREEDY = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
LONG = SamplingParams(max_new_tokens=2000, ignore_eos=True)
DOCUMENT = prompt_ids(100, seed=4)
QUESTIONS = [prompt_ids(length, seed=length) for length in (1, 5, 30, 12)]
SPLITS: dict[str, list[tuple[int, int | None]]] = {
    "one worker": [(0, None)],
    "two workers": [(1, 48), (0, None)],
    "a worker has two spans": [(1, 24), (0, 32), (1, 16), (0, None)],
    "the end elsewhere": [(0, 24), (2, 24), (1, None)],
}


def wanted(model: str = "llama-gqa", questions: list[list[int]] = QUESTIONS, new: int = NEW) -> list[list[int]]:
    prompts = [DOCUMENT + question for question in questions]
    return [reference_generate(model_dir(model), [prompt], new)[0].tokens for prompt in prompts]


def used_blocks(status: EngineStatus) -> int:
    return sum(one.used_blocks for one in status.workers.values())


def pools(engine: Engine, *workers: Worker) -> int:
    open_ones = [worker.plugins["distkv"].engines[engine.id] for worker in workers]
    return sum(one.runtime.pool.used_blocks for one in open_ones)


async def emptied(engine: Engine, *workers: Worker) -> bool:
    for _ in range(200):
        if not pools(engine, *workers):
            return True
        await asyncio.sleep(0.05)
    return False


@pytest.mark.parametrize("granularity", ["window", "layer"])
@pytest.mark.parametrize("name", SPLITS)
def test_questions_on_any_split_give_the_tokens_of_plain_transformers(
    name: str, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = wanted()
    workers = force_split(SPLITS[name], monkeypatch)

    @engine_test(workers=workers)
    async def run(client: Client, scheduler: Scheduler, *them: Worker) -> None:
        settings = SMALL | {"granularity": granularity}
        async with (
            Engine(client, str(model_dir("llama-gqa")), kv_memory="4 MiB", **settings) as engine,
            await engine.ingest(DOCUMENT) as document,
        ):
            done = await document.ask(QUESTIONS, GREEDY)
            assert [list(one.token_ids) for one in done] == expected
            assert [one.reused_tokens for one in done] == [96] * 4
            assert [one.prompt_tokens for one in done] == [100 + len(question) for question in QUESTIONS]
            alone = await document.ask(QUESTIONS[2], GREEDY)
            assert list(alone.token_ids) == expected[2]

    run()


@pytest.mark.parametrize("model", ["qwen3", "phi3", "llama-mha"])
def test_questions_give_the_tokens_of_plain_transformers_in_other_families(model: str) -> None:
    expected = wanted(model)

    @engine_test(workers=2)
    async def run(client: Client, scheduler: Scheduler, *them: Worker) -> None:
        memory = 24 * block_bytes(model)
        async with Engine(client, str(model_dir(model)), kv_memory=memory, **SMALL) as engine:
            document = await engine.ingest(DOCUMENT)
            done = await document.ask(QUESTIONS, GREEDY)
            assert [list(one.token_ids) for one in done] == expected

    run()


@engine_test(workers=2)
async def test_the_blocks_of_a_document_are_there_once_and_freed_with_its_last_question(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    settings = SMALL | {"window_steps": 4}
    async with Engine(client, str(model_dir("llama-gqa")), kv_memory="16 MiB", **settings) as engine:
        document = await engine.ingest(DOCUMENT, name="a hundred")
        assert engine.documents() == {"a hundred": document}
        assert used_blocks(await engine.status()) == pools(engine, *workers) == 12
        running = [document.submit(question, LONG) for question in QUESTIONS[:2]]
        while sum(one.generated_tokens > 4 for one in (await engine.status()).sequences.values()) < 2:
            await asyncio.sleep(0.02)
        own = sum(-(-(100 + len(question) + 1999 - 96) // 8) for question in QUESTIONS[:2])
        assert used_blocks(await engine.status()) == pools(engine, *workers) == 12 + own
        homes = {one.home for one in (await engine.status()).sequences.values() if one.state == "decode"}
        assert len(homes) == 1
        await document.release()
        assert engine.documents() == {}
        with pytest.raises(EngineClosedError, match="released"):
            document.submit(QUESTIONS[0])
        running[0].cancel()
        await asyncio.sleep(0.1)
        assert pools(engine, *workers) >= 12
        running[1].cancel()
        assert await emptied(engine, *workers)
        await until_idle(engine)


@engine_test(workers=2)
async def test_questions_and_other_requests_decode_beside_each_other(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    other = prompt_ids(40, seed=9)
    expected = [*wanted(), *(run.tokens for run in reference_generate(model_dir("llama-gqa"), [other], 30))]
    settings = SMALL | {"window_steps": 4}
    async with Engine(client, str(model_dir("llama-gqa")), kv_memory="4 MiB", **settings) as engine:
        document = await engine.ingest(DOCUMENT)
        beside = engine.submit(other, SamplingParams(max_new_tokens=30, ignore_eos=True))
        running = []
        for question in QUESTIONS:
            running.append(document.submit(question, GREEDY))
            await asyncio.sleep(0.05)
        done: list[Completion] = [await one for one in [*running, beside]]
        assert [list(one.token_ids) for one in done] == expected


@engine_test(workers=2)
async def test_a_chat_keeps_its_turns_and_says_what_one_long_prompt_would(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    async with Engine(client, str(model_dir("llama-gqa")), kv_memory="4 MiB", **SMALL) as engine:
        document = await engine.ingest(DOCUMENT)
        said = list(DOCUMENT)
        async with document.chat() as chat:
            reused = []
            for question in QUESTIONS:
                said += question
                done = await chat.ask(question, GREEDY)
                assert list(done.token_ids) == reference_generate(model_dir("llama-gqa"), [said], NEW)[0].tokens
                said += done.token_ids
                reused.append(done.reused_tokens)
            assert reused == [96, 104, 120, 160]  # whole blocks of the turns before, without the last token
            assert len(chat.turns) == 4
        assert used_blocks(await engine.status()) == 12
        await document.release()
        assert await emptied(engine, *workers)


@engine_test(workers=2)
async def test_idle_documents_make_room_for_others_and_are_still_answered(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    memory = 16 * block_bytes("llama-gqa")
    texts = [prompt_ids(100, seed=seed) for seed in range(4)]
    question = QUESTIONS[1]
    expected = [reference_generate(model_dir("llama-gqa"), [text + question], NEW)[0].tokens for text in texts]
    async with Engine(client, str(model_dir("llama-gqa")), kv_memory=memory, **SMALL) as engine:
        documents: list[Document] = [await engine.ingest(text) for text in texts]
        for _ in range(2):
            done = await asyncio.gather(*(document.ask(question, GREEDY) for document in documents))
            assert [list(one.token_ids) for one in done] == expected
        for document in documents:
            await document.release()
        assert await emptied(engine, *workers)


@engine_test(workers=3)
async def test_a_document_survives_a_worker_that_leaves_and_one_that_dies(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    expected = wanted()
    memory = 20 * block_bytes("llama-gqa")
    async with Engine(client, str(model_dir("llama-gqa")), kv_memory=memory, **SMALL) as engine:
        document = await engine.ingest(DOCUMENT)
        placement = (await engine.status()).sequences[document.number].placement
        first, last = placement[0].worker, placement[-1].worker
        await client.retire_workers([first])
        assert first not in scheduler.workers
        done = await document.ask(QUESTIONS, GREEDY)
        assert [list(one.token_ids) for one in done] == expected
        assert all(one.reused_tokens == 96 for one in done)
        placement = (await engine.status()).sequences[document.number].placement
        (holder,) = [worker for worker in workers if worker.address == placement[-1].worker]
        await holder.close()
        done = await document.ask(QUESTIONS, GREEDY)
        assert [list(one.token_ids) for one in done] == expected
        assert last


@engine_test(workers=1)
async def test_what_cannot_be_ingested_or_asked_is_said(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
    async with Engine(client, str(model_dir("llama-gqa")), kv_memory="1 MiB", **SMALL) as engine:
        for source, words in [
            ([], "empty"),
            (" ", "empty"),
            (7, "not int"),
            ([1, 100000], "vocabulary"),
            ("a text", "no tokenizer"),
            ([1] * 5000, "no room for a question"),
        ]:
            with pytest.raises(InvalidRequestError, match=words):
                await engine.ingest(source)
        with pytest.raises(SourceError, match="cannot be read"):
            await engine.ingest(Path("nowhere.txt"))
        with pytest.raises(CapacityError, match="a document of 3000 tokens"):
            await engine.ingest([1] * 3000)
        assert engine.documents() == {}
        document = await engine.ingest([1] * 30, name="one")
        with pytest.raises(InvalidRequestError, match="already"):
            await engine.ingest([1] * 30, name="one")
        with pytest.raises(InvalidRequestError, match="not int"):
            document.ask(5)
        with pytest.raises(InvalidRequestError, match="vocabulary"):
            document.ask([100000])
        done = await document.ask([[1], "a text", [2]], GREEDY)
        assert [one.finish_reason for one in done] == ["length", "error", "length"]


@engine_test(workers=1)
async def test_short_documents_are_answered_too(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
    async with Engine(client, str(model_dir("llama-gqa")), kv_memory="1 MiB", **SMALL) as engine:
        async with await engine.ingest(DOCUMENT[:3]) as document:
            done = await document.ask([[5, 6], [7]], GREEDY)
            expected = [
                reference_generate(model_dir("llama-gqa"), [DOCUMENT[:3] + more], NEW)[0].tokens
                for more in ([5, 6], [7])
            ]
            assert [list(one.token_ids) for one in done] == expected
            assert [one.reused_tokens for one in done] == [0, 0]
        await until_idle(engine)


@engine_test(workers=1)
async def test_an_engine_that_closes_takes_its_documents_along(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    engine = await Engine(client, str(model_dir("llama-gqa")), kv_memory="4 MiB", **SMALL)
    document = await engine.ingest(DOCUMENT)
    running = document.submit(QUESTIONS[0], LONG)
    await engine.close()
    assert running.cancelled()
    await document.release()
    with pytest.raises(EngineClosedError):
        document.submit(QUESTIONS[0])


def test_documents_in_a_plain_script() -> None:
    expected = wanted()
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as client,
        Engine(client, str(model_dir("llama-gqa")), kv_memory="4 MiB", **SMALL) as engine,
    ):
        with engine.ingest(DOCUMENT) as document, document.chat() as chat:
            assert [list(one.token_ids) for one in document.ask(QUESTIONS, GREEDY)] == expected
            assert list(chat.ask(QUESTIONS[0], GREEDY).token_ids) == expected[0]
            assert list(document.stream(QUESTIONS[0], GREEDY)) == []
        assert engine.documents() == {}
