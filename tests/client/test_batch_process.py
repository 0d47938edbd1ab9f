"""A batch gives the answers of plain requests, whatever its source, and continues where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client, Scheduler, Worker

from distkv_dask import Engine, InvalidRequestError, OutputError, SamplingParams, SourceError, TooManyErrorsError
from distkv_dask.completion import Completion
from tests._cluster import engine_test, until_idle
from tests._models import MAX_POSITIONS, text_model_dir

TINY: dict[str, Any] = {"dtype": "float32", "kv_memory": "8 MiB", "block_tokens": 8, "prefill_chunk_tokens": 256}
FEW = SamplingParams(max_new_tokens=6, ignore_eos=True)
TEXTS = [f"Report {number}: {'profits rose. ' * number}" for number in range(8)]
TABLE = pa.table({"id": [f"r{number}" for number in range(8)], "text": TEXTS})


def tiny(client: Client) -> Engine:
    return Engine(client, str(text_model_dir()), **TINY)


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


async def plain(engine: Engine, texts: list[str], sampling: SamplingParams = FEW) -> list[Completion]:
    """Answers to the same prompts as plain requests."""
    done: list[Completion] = await engine.generate([chat(text) for text in texts], sampling)
    return done


def answers(path: Path, by: str = "row") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).sort_by([(by, "ascending"), ("question", "ascending")]).to_pylist()
    return rows


def submissions(engine: Engine) -> list[Any]:
    """The prompts that are submitted from now on."""
    seen: list[Any] = []
    session = engine._session
    submit = session.submit_ids

    def noted(prompt: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(prompt)
        return submit(prompt, *arguments, **options)

    session.submit_ids = noted  # type: ignore[assignment, method-assign]
    return seen


@engine_test(workers=2)
async def test_a_table_and_a_folder_give_the_answers_of_the_same_prompts(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    folder = Path(client.local_directory if hasattr(client, "local_directory") else workers[0].local_directory)
    (folder / "docs").mkdir()
    for number, text in enumerate(TEXTS):
        (folder / "docs" / f"{number}.txt").write_text(text)
    async with tiny(client) as engine:
        expected = await plain(engine, [f"{text}\n\nWho?" for text in TEXTS])
        done = await engine.process(TABLE, question="Who?", out=folder / "table", sampling=FEW)
        assert (done.rows, done.earlier, done.errors) == (8, 0, 0)
        found = answers(folder / "table")
        assert [one["answer"] for one in found] == [one.text for one in expected]
        assert [one["id"] for one in found] == TABLE["id"].to_pylist()
        assert [one["prompt_tokens"] for one in found] == [one.prompt_tokens for one in expected]
        assert {(one["new_tokens"], one["finish_reason"], one["error"], one["question"]) for one in found} == {
            (6, "length", None, "Who?")
        }
        await engine.process(folder / "docs", question="Who?", out=folder / "files", sampling=FEW)
        found = answers(folder / "files", by="path")
        assert [(one["path"], one["answer"]) for one in found] == [
            (f"{number}.txt", one.text) for number, one in enumerate(expected)
        ]


@engine_test(workers=1)
async def test_templates_use_columns_and_every_question_has_its_row(
    client: Client, scheduler: Scheduler, worker: Worker
) -> None:
    out = Path(worker.local_directory) / "out"
    template = "{id}: {text} {{sic}}\n{question}"
    async with tiny(client) as engine:
        prompts = [f"{one['id']}: {one['text']} {{sic}}\n{q}" for one in TABLE.to_pylist() for q in ("What?", "Who?")]
        expected = await plain(engine, prompts)
        options = {"questions": ["Who?", "What?"], "template": template, "sampling": FEW, "keep": []}
        await engine.process(TABLE, out=out, **options)
        found = answers(out)
        assert [one["answer"] for one in found] == [one.text for one in expected]
        assert "id" not in found[0]


@engine_test(workers=2)
async def test_several_questions_about_a_row_compute_its_text_once(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    out = Path(workers[0].local_directory) / "out"
    texts = [f"{number} " + "a long text " * (10 + number) for number in range(5)]
    questions = ["Who?", "What?", "Why?"]
    async with tiny(client) as engine:
        expected = await plain(engine, [f"{text}\n\n{asked}" for text in texts for asked in sorted(questions)])
        before = (await engine.status()).totals["prefilled_tokens"]
        table = pa.table({"text": [*texts, None, " "]})
        done = await engine.process(table, questions=questions, out=out, sampling=FEW, keep=[])
        assert (done.rows, done.errors) == (21, 6)
        found = answers(out)
        assert [one["answer"] for one in found if one["error"] is None] == [one.text for one in expected]
        assert all(one["reused_tokens"] > 100 for one in found if one["error"] is None)
        apart = sum(one.prompt_tokens for one in expected)
        assert (await engine.status()).totals["prefilled_tokens"] - before < 0.6 * apart
        await until_idle(engine)


@engine_test(workers=1)
async def test_the_same_call_again_computes_only_what_is_missing(
    client: Client, scheduler: Scheduler, worker: Worker
) -> None:
    out = Path(worker.local_directory) / "out"
    async with tiny(client) as engine:
        await engine.process(TABLE.slice(0, 5), question="Who?", out=out, sampling=FEW)
        seen = submissions(engine)
        done = await engine.process(TABLE, question="Who?", out=out, sampling=FEW)  # the table has grown
        assert (done.rows, done.earlier, len(seen)) == (8, 5, 3)
        assert [one["row"] for one in answers(out)] == list(range(8))
        assert (await engine.process(TABLE, question="Who?", out=out, sampling=FEW)).rows == 8
        assert len(seen) == 3
        with pytest.raises(OutputError, match="questions was"):
            await engine.process(TABLE, question="Why?", out=out, sampling=FEW)
        with pytest.raises(OutputError, match="max_new_tokens was 6, is 7"):
            await engine.process(TABLE, question="Who?", out=out, sampling=SamplingParams(max_new_tokens=7))
        with pytest.raises(SourceError, match="row 0 of the source has changed"):
            await engine.process(TABLE.slice(1), question="Who?", out=out, sampling=FEW)
        assert len(seen) == 3


@engine_test(workers=1)
async def test_bad_rows_are_errors_in_their_rows_until_there_are_too_many(
    client: Client, scheduler: Scheduler, worker: Worker
) -> None:
    out = Path(worker.local_directory) / "out"
    texts = ["good", None, " ", "x" * MAX_POSITIONS, "good too"]
    table = pa.table({"text": texts})
    async with tiny(client) as engine:
        with pytest.raises(TooManyErrorsError, match="max_errors=1"):
            await engine.process(table, question="Who?", out=out, sampling=FEW, max_errors=1, in_flight=1)
        done = await engine.process(table, question="Who?", out=out, sampling=FEW, max_errors=3)
        assert (done.rows, done.errors) == (5, 3)
        errors = [one["error"] for one in answers(out)]
        assert [error is None for error in errors] == [True, False, False, False, True]
        assert "(null)" in errors[1]
        assert "empty" in errors[2]
        assert f"window of {MAX_POSITIONS} tokens" in errors[3]
        with pytest.raises(TooManyErrorsError, match="already"):
            await engine.process(table, question="Who?", out=out, sampling=FEW, max_errors=0)
        seen = submissions(engine)
        done = await engine.process(table, question="Who?", out=out, sampling=FEW, retry_errors=True)
        assert (done.rows, done.earlier, done.errors, len(seen)) == (5, 2, 3, 1)


@engine_test(workers=2)
async def test_long_documents_are_cut_where_the_user_says_and_the_row_tells(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    folder = Path(workers[0].local_directory)
    head, tail = "A" * 3000, "Z" * 3000
    room = MAX_POSITIONS - FEW.max_new_tokens - len("[]\n\nWho?") + 1  # a newline is one token, brackets are two
    room = MAX_POSITIONS - FEW.max_new_tokens - len("[\n\nWho?]")
    kept = {
        "truncate-tail": head + "Z" * (room - 3000),
        "truncate-head": "A" * (room - 3000) + tail,
        "truncate-middle": "A" * ((room + 1) // 2) + "Z" * (room // 2),
    }
    async with tiny(client) as engine:
        for how, text in kept.items():
            (expected,) = await plain(engine, [f"{text}\n\nWho?"])
            assert expected.prompt_tokens == MAX_POSITIONS - FEW.max_new_tokens
            table = pa.table({"text": [head + tail, "short"]})
            await engine.process(table, question="Who?", out=folder / how, sampling=FEW, too_long=how)
            long, short = answers(folder / how)
            assert (long["answer"], long["dropped_tokens"]) == (expected.text, 6000 - room)
            assert short["dropped_tokens"] == 0


@engine_test(workers=2)
async def test_map_reduce_asks_overlapping_parts_and_combines_their_answers(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    text = "".join(chr(ord("a") + number % 26) for number in range(9000))
    size, overlap = MAX_POSITIONS - FEW.max_new_tokens - len("[\n\nWho?]"), 100
    parts = [text[start : start + size] for start in range(0, len(text) - overlap, size - overlap)]
    async with tiny(client) as engine:
        each = await plain(engine, [f"{part}\n\nWho?" for part in parts])
        joined = "\n\n".join(one.text.strip() for one in each)
        (expected,) = await plain(engine, [f"{joined} so, Who?"])
        out = Path(workers[0].local_directory) / "out"
        options = {"too_long": "map-reduce", "overlap": overlap, "combine": "{answers} so, {question}"}
        await engine.process(pa.table({"text": [text]}), question="Who?", out=out, sampling=FEW, **options)
        (found,) = answers(out)
        assert (found["answer"], found["parts"]) == (expected.text.strip(), 3)
        assert found["prompt_tokens"] == sum(one.prompt_tokens for one in [*each, expected])


@engine_test(workers=1)
async def test_openai_batch_files_are_answered_in_their_own_format(
    client: Client, scheduler: Scheduler, worker: Worker
) -> None:
    folder = Path(worker.local_directory)
    body = {"model": "any", "messages": chat("Hello"), "max_tokens": 6, "temperature": 0}
    lines = [
        {"custom_id": "one", "method": "POST", "url": "/v1/chat/completions", "body": body},
        {"custom_id": "two", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Hi", "max_tokens": 4}},
        {"custom_id": "tools", "method": "POST", "url": "/v1/chat/completions", "body": {**body, "tools": [{}]}},
        {"custom_id": "n", "method": "POST", "url": "/v1/chat/completions", "body": {**body, "n": 1, "seed": 3}},
    ]
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\nnonsense\n")
    async with tiny(client) as engine:
        (expected,) = await plain(engine, ["Hello"], SamplingParams(max_new_tokens=6))
        done = await engine.process(folder / "in.jsonl", out=folder / "out.jsonl")
        assert (done.rows, done.errors) == (5, 2)
        with pytest.raises(InvalidRequestError, match="own prompts"):
            await engine.process(folder / "in.jsonl", question="Who?", out=folder / "x.jsonl")
        with pytest.raises(OutputError, match="name a folder"):
            await engine.process(TABLE, question="Who?", out=folder / "y.jsonl")
    found = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [one["custom_id"] for one in found] == ["one", "two", "tools", "n", None]
    one = found[0]["response"]["body"]
    assert one["choices"][0]["message"] == {"role": "assistant", "content": expected.text}
    assert one["usage"] == {"prompt_tokens": 7, "completion_tokens": 6, "total_tokens": 13}
    assert found[1]["response"]["body"]["usage"]["completion_tokens"] == 4
    assert "tools" in found[2]["error"]["message"]
    assert found[3]["response"]["status_code"] == 200


@engine_test(workers=1)
async def test_what_does_not_go_together_is_refused_before_anything_runs(
    client: Client, scheduler: Scheduler, worker: Worker
) -> None:
    out = Path(worker.local_directory) / "out"
    async with tiny(client) as engine:
        for options, words in [
            ({"question": "Who?", "questions": ["What?"]}, "either"),
            ({"questions": []}, "questions should be"),
            ({"questions": ["Who?", "Who?"]}, "twice"),
            ({"question": "Who?", "template": "{text}"}, r"\{question\}"),
            ({"template": "{text} {question}"}, "give a question"),
            ({"template": "{title} {text}"}, "the source has only: id, text"),
            ({"template": "{text.x}"}, "only column names"),
            ({"template": "{text"}, "cannot be read"),
            ({"template": "nothing"}, r"\{text\}"),
            ({"questions": "Who?"}, "give a list"),
            ({"too_long": "shorten"}, "must be one of"),
            ({"too_long": "map-reduce"}, "needs a question"),
            ({"text_column": "body"}, "no column 'body'"),
            ({"keep": ["no"]}, "no column 'no'"),
        ]:
            with pytest.raises((InvalidRequestError, SourceError), match=words):
                await engine.process(TABLE, out=out, **options)
        with pytest.raises(SourceError, match="'answer' has the name of another column of the output"):
            await engine.process(TABLE.append_column("answer", TABLE["id"]), out=out)
    assert not out.exists()


@engine_test(workers=2)
async def test_answers_of_a_schema_fill_typed_columns_and_those_cut_off_are_error_rows(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed (extra: schema)")
    folder = Path(workers[0].local_directory)
    year = {"type": "integer", "minimum": 1000, "maximum": 2999}
    properties = {"year": year, "sure": {"type": "boolean"}, "years": {"type": "array", "items": year, "maxItems": 2}}
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    (folder / "schema.json").write_text(json.dumps(schema))
    async with Engine(client, str(text_model_dir(end=True)), **TINY) as engine:
        enough = SamplingParams(max_new_tokens=80)
        done = await engine.process(TABLE, out=folder / "out", schema=folder / "schema.json", sampling=enough)
        assert (done.rows, done.errors) == (8, 0)
        table = pq.read_table(folder / "out")
        types = [pa.int64(), pa.bool_(), pa.list_(pa.int64())]
        assert [table.schema.field(name).type for name in properties] == types
        for one in table.to_pylist():
            assert {name: one[name] for name in properties} == json.loads(one["answer"])
        few = SamplingParams(max_new_tokens=9)
        done = await engine.process(TABLE, out=folder / "cut", schema=schema, sampling=few)
        assert done.errors == 8
        (error,) = {one["error"].partition("(")[0] for one in answers(folder / "cut")}
        assert error == "the answer is not complete JSON "
        assert all(one["year"] is None and one["answer"] for one in answers(folder / "cut"))
        clash = {"type": "object", "properties": {"answer": {"type": "string"}}}
        with pytest.raises(SourceError, match="rename it in the JSON schema"):
            await engine.process(TABLE, out=folder / "clash", schema=clash)
