"""Embeddings of texts, tables and folders, in Python, lazy frames and on the command line: those of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from click.testing import CliRunner, Result
from distributed import Client, LocalCluster, Scheduler, Worker

from distkv_dask import Engine, InvalidRequestError, SamplingParams
from distkv_dask.client.cli import main
from tests._cluster import engine_test
from tests._embeddings import check
from tests._models import text_model_dir

SMALL: dict[str, Any] = {"dtype": "float32", "kv_memory": "8 MiB", "block_tokens": 8, "prefill_chunk_tokens": 32}
TEXTS = [f"Report {number}: {'profits rose. ' * number}" for number in range(6)]
MODEL = str(text_model_dir())
SIZE = transformers.AutoConfig.from_pretrained(MODEL).hidden_size


def tokens(text: str) -> list[int]:
    """Embeddings of plain transformers."""
    ids: list[int] = transformers.AutoTokenizer.from_pretrained(MODEL)(text)["input_ids"]
    return ids


def check_rows(texts: list[str], embed: str, rows: Any) -> None:
    assert len(rows) == len(texts)
    for text, row in zip(texts, rows, strict=True):
        check(MODEL, tokens(text), embed, np.asarray(row, np.float32))


@engine_test(2)
async def test_a_text_gives_a_vector_and_several_a_matrix(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    async with Engine(client, MODEL, **SMALL) as engine:
        one = await engine.embed(TEXTS[3])
        assert (one.shape, one.dtype) == ((SIZE,), np.float32)
        check(MODEL, tokens(TEXTS[3]), "mean", one)
        check_rows(TEXTS, "last", await engine.embed(TEXTS, "last"))
        same = await engine.embed([tokens(TEXTS[3])], normalize=True)
        assert same.shape == (1, SIZE)
        assert same[0] == pytest.approx(one / np.linalg.norm(one), abs=1e-6)
        assert np.array_equal(await engine.embed(tokens(TEXTS[3]), priority=1), one)
        for wrong, words in [("", "empty"), ([], "empty"), (["a", ""], "empty"), ([{"role": "user"}], "not a text")]:
            with pytest.raises(InvalidRequestError, match=words):
                engine.embed(wrong)
        with pytest.raises(InvalidRequestError, match="longer than the model's window"):
            engine.embed(["a", "b" * 10_000])
        with pytest.raises(InvalidRequestError, match="leave them out"):
            engine.embed("a", out="somewhere")
        assert not (await engine.status()).sequences, "nothing was begun"


def test_a_table_and_a_folder_give_a_column_of_lists_of_fixed_size(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "docs" / f"{number}.txt").write_text(text)
    table = pa.table({"text": [*TEXTS, " ", "x" * 10_000], "id": range(8)})

    @engine_test(2)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with Engine(client, MODEL, **SMALL) as engine:
            done = await engine.embed(table, out=tmp_path / "table")
            assert (done.rows, done.errors) == (8, 2)
            again = await engine.embed(table, out=tmp_path / "table")
            assert (again.rows, again.earlier) == (8, 8)
            await engine.process(tmp_path / "docs", sampling=SamplingParams(embed="last"), out=tmp_path / "folder")
            cut = {"too_long": "truncate-tail", "template": "text: {text}", "out": tmp_path / "cut"}
            await engine.embed(pa.table({"text": ["y" * 10_000]}), **cut)
            window = int(engine.facts.max_positions)
            with pytest.raises(InvalidRequestError, match="into the template"):
                engine.embed(table, question="Why?", out=tmp_path / "no")
            needed = await engine.estimate(table, sampling=SamplingParams(embed="mean"))
            assert (needed.requests, needed.refused, needed.new_tokens) == (6, 2, 0)
            assert needed.decode_seconds == 0
            assert needed.prompt_tokens == sum(len(tokens(text)) for text in TEXTS)
            await engine.process(pa.table({"text": [TEXTS[2]]}), out=tmp_path / "answers")
            (row,) = pq.read_table(tmp_path / "cut").to_pylist()
            assert row["prompt_tokens"] == window
            check(MODEL, tokens("text: " + "y" * 10_000)[:window], "mean", np.asarray(row["embedding"], np.float32))

    run()
    found = pq.read_table(tmp_path / "table").sort_by("row")
    assert found.schema.field("embedding").type == pa.list_(pa.float32(), SIZE)
    check_rows(TEXTS, "mean", found["embedding"].to_pylist()[:6])
    assert found["embedding"].to_pylist()[6:] == [None, None]
    assert ["empty" in found["error"][6].as_py(), "window" in found["error"][7].as_py()] == [True, True]
    assert set(found["new_tokens"].to_pylist()[:6]) == {0}
    folder = pq.read_table(tmp_path / "folder").sort_by("path")
    check_rows(TEXTS, "last", folder["embedding"].to_pylist())
    assert "embedding" not in pq.read_schema(tmp_path / "answers" / "part-000000.parquet").names


@engine_test(2)
async def test_a_lazy_frame_has_the_column_that_it_says_it_has(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    frame = pd.DataFrame({"text": TEXTS, "id": list("abcdef")}, index=range(10, 16))
    async with Engine(client, MODEL, **SMALL) as engine:
        for source in (frame, dd.from_pandas(frame, npartitions=3)):
            lazy = await engine.embed(source, "last")
            found = await client.compute(lazy)
            assert list(found.dtypes) == list(lazy.dtypes)
            assert found.dtypes["embedding"] == pd.ArrowDtype(pa.list_(pa.float32(), SIZE))
            assert found["id"].tolist() == frame["id"].tolist()
            check_rows(TEXTS, "last", found["embedding"])


def test_a_batch_file_has_answers_and_embeddings_beside_each_other(tmp_path: Path) -> None:
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/embeddings", {"input": TEXTS[1]}),
        ("/v1/embeddings", {"input": [TEXTS[2], tokens(TEXTS[3])], "embed": "last"}),
        ("/v1/completions", {"prompt": TEXTS[1], "max_tokens": 3, "temperature": 0}),
        ("/v1/embeddings", {"input": TEXTS[1], "dimensions": 8}),
        ("/v1/embeddings", {"input": [TEXTS[1], ""]}),
    ]
    asked = [{"custom_id": str(at), "url": url, "body": body} for at, (url, body) in enumerate(bodies)]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))

    @engine_test(1)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with Engine(client, MODEL, **SMALL) as engine:
            await engine.process(tmp_path / "asked.jsonl", out=tmp_path / "answers.jsonl")
            estimate = await engine.estimate(tmp_path / "asked.jsonl")
            assert (estimate.requests, estimate.refused, estimate.new_tokens) == (4, 2, 3)
            with pytest.raises(InvalidRequestError, match="leave out embed"):
                await engine.embed(tmp_path / "asked.jsonl", out=tmp_path / "no.jsonl")

    run()
    one, two, text, *wrong = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    body = one["response"]["body"]
    assert (body["object"], body["usage"]["total_tokens"]) == ("list", len(tokens(TEXTS[1])))
    check_rows([TEXTS[1]], "mean", [each["embedding"] for each in body["data"]])
    body = two["response"]["body"]
    assert [each["index"] for each in body["data"]] == [0, 1]
    check_rows(TEXTS[2:4], "last", [each["embedding"] for each in body["data"]])
    assert body["usage"]["prompt_tokens"] == len(tokens(TEXTS[2])) + len(tokens(TEXTS[3]))
    assert len(text["response"]["body"]["choices"]) == 1
    assert [bad["response"] for bad in wrong] == [None, None]
    assert ["dimensions" in wrong[0]["error"]["message"], "empty" in wrong[1]["error"]["message"]] == [True, True]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments])


@pytest.mark.slow
def test_the_command_writes_the_same_and_refuses_what_makes_no_sense(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "table.parquet")
    run = ["run", tmp_path / "table.parquet", "--embed"]
    for more, words in [
        (["sum"], "'sum' is not one of"),
        (["mean", "-q", "Who?"], "into the template"),
        (["mean", "--max-new-tokens", 5], "max_new_tokens"),
        (["mean", "--choices", "a,b"], "choices"),
        (["mean", "--temperature", 1], "temperature"),
    ]:
        refused = call(*run, *more, "-o", tmp_path / "no")
        assert (refused.exit_code in (1, 2), words in refused.output) == (True, True), refused.output
    alone = call("run", tmp_path / "table.parquet", "--normalize", "-o", tmp_path / "no")
    assert "normalize is for embeddings" in alone.output
    assert not (tmp_path / "no").exists()
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster),
    ):
        model = ["--model", MODEL, "--dtype", "float32", "--kv-memory", "8 MiB"]
        where = [*model, "--scheduler", cluster.scheduler_address]
        done = call(*run, "mean", "-o", tmp_path / "mean", *where)
        assert done.exit_code == 0, done.output
        check_rows(TEXTS, "mean", pq.read_table(tmp_path / "mean").sort_by("row")["embedding"].to_pylist())
        done = call(*run, "last", "--normalize", "-o", tmp_path / "last", *where)
        assert done.exit_code == 0, done.output
        lengths = [np.linalg.norm(one) for one in pq.read_table(tmp_path / "last")["embedding"].to_pylist()]
        assert lengths == pytest.approx([1] * 6, abs=1e-6)
        other = call(*run, "last", "-o", tmp_path / "mean", *where)
        assert "sampling.embed was 'mean', is 'last'" in other.output
