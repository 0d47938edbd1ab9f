"""Answers as a Dask DataFrame: those of plain requests, in the source's order, computed by tasks on demand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.bag as db
import dask.dataframe as dd
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client, Scheduler, Worker

from distkv_dask import Engine, EngineClosedError, InvalidRequestError, SamplingParams, SourceError
from tests._cluster import engine_test, until_idle
from tests._models import text_model_dir

TINY: dict[str, Any] = {"dtype": "float32", "kv_memory": "8 MiB", "block_tokens": 8, "prefill_chunk_tokens": 256}
FEW = SamplingParams(max_new_tokens=6, ignore_eos=True)
TEXTS = [f"Report {number}: {'profits rose. ' * number}" for number in range(9)]
FRAME = pd.DataFrame({"id": list("abcdefghi"), "n": range(9), "text": TEXTS}, index=range(10, 19))


def tiny(client: Client) -> Engine:
    return Engine(client, str(text_model_dir()), **TINY)


async def plain(engine: Engine, texts: list[str]) -> list[str]:
    """Answers to the same prompts as plain requests."""
    done = await engine.generate([[{"role": "user", "content": text}] for text in texts], FEW)
    return [one.text for one in done]


async def computed(client: Client, lazy: Any) -> pd.DataFrame:
    frame: pd.DataFrame = await client.compute(lazy)
    assert list(frame.dtypes) == list(lazy.dtypes), "what was said of it beforehand holds"
    assert list(frame.columns) == list(lazy.columns)
    return frame


SOURCES: dict[str, Callable[[Path], Any]] = {
    "pandas": lambda folder: FRAME,
    "dask": lambda folder: dd.from_pandas(FRAME, npartitions=3),
    "arrow": lambda folder: pa.Table.from_pandas(FRAME, preserve_index=False),
    "bag": lambda folder: db.from_sequence(FRAME.to_dict("records"), npartitions=3),
    "texts": lambda folder: db.from_sequence(TEXTS, npartitions=2),
    "parquet": lambda folder: folder / "t.parquet",
    "csv": lambda folder: folder / "t.csv",
    "files": lambda folder: folder / "docs",
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_answers_of_plain_requests_in_its_order(kind: str, tmp_path: Path) -> None:
    FRAME.to_csv(tmp_path / "t.csv", index=False)
    pq.write_table(pa.Table.from_pandas(FRAME, preserve_index=False), tmp_path / "t.parquet")
    (tmp_path / "docs").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "docs" / f"{number}.txt").write_text(text)

    @engine_test(workers=2)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        async with tiny(client) as engine:
            lazy = await engine.process(SOURCES[kind](tmp_path), sampling=FEW)
            assert isinstance(lazy, dd.DataFrame)
            assert lazy.npartitions > 1
            assert not (await engine.status()).totals.get("finished_length"), "nothing was asked yet"
            frame = await computed(client, lazy)
            assert frame["answer"].tolist() == await plain(engine, TEXTS)
            if kind in ("pandas", "dask"):
                assert frame.index.tolist() == FRAME.index.tolist()
                assert lazy.known_divisions
            if kind == "files":
                assert frame["path"].tolist() == [f"{number}.txt" for number in range(9)]
            elif kind != "texts":
                assert [str(one) for one in frame["id"]] == FRAME["id"].tolist()
            await until_idle(engine)

    run()


@engine_test(workers=2)
async def test_answers_are_joined_and_filtered_like_any_frame(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    async with tiny(client) as engine:
        lazy = await engine.process(FRAME, questions=["Who?", "What?"], sampling=FEW, keep=["n"])
        frame = await computed(client, lazy[lazy.n > 5])
        assert frame.index.tolist() == [16, 16, 17, 17, 18, 18]
        assert frame["question"].tolist() == ["Who?", "What?"] * 3
        assert frame["answer"].tolist() == await plain(
            engine, [f"{text}\n\n{question}" for text in TEXTS[6:] for question in ("Who?", "What?")]
        )


@engine_test(workers=2)
async def test_bad_rows_are_errors_in_their_rows(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
    texts = [*TEXTS[:3], None, "", TEXTS[3], "x" * 100_000]
    async with tiny(client) as engine:
        lazy = await engine.process(dd.from_pandas(pd.DataFrame({"text": texts}), npartitions=2), sampling=FEW)
        frame = await computed(client, lazy)
        good = frame["error"].isna()
        assert good.tolist() == [True, True, True, False, False, True, False]
        assert frame["answer"][good].tolist() == await plain(engine, TEXTS[:4])
        assert frame["finish_reason"][~good].tolist() == ["error"] * 3
        strict = await engine.process(pd.DataFrame({"text": texts}), sampling=FEW, max_errors=0)
        with pytest.raises(Exception, match="max_errors=0"):
            await client.compute(strict)


@engine_test(workers=1)
async def test_what_does_not_go_together_is_refused_at_once_and_a_closed_engine_when_computed(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    async with tiny(client) as engine:
        with pytest.raises(InvalidRequestError, match="out="):
            await engine.process(FRAME, retry_errors=True)
        with pytest.raises(SourceError, match="no column"):
            await engine.process(FRAME, text_column="body")
        with pytest.raises(SourceError, match="name of another column"):
            await engine.process(FRAME.rename(columns={"id": "answer"}))
        lazy = await engine.process(FRAME, sampling=FEW)
    with pytest.raises(EngineClosedError):
        await client.compute(lazy)


@engine_test(workers=2)
async def test_a_computation_that_is_cancelled_stops_asking(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    async with Engine(client, str(text_model_dir()), window_steps=2, **TINY) as engine:
        lazy = await engine.process(FRAME, sampling=SamplingParams(max_new_tokens=700, ignore_eos=True))
        future = client.compute(lazy)
        while not (await engine.status()).sequences:
            await asyncio.sleep(0.05)
        await future.cancel()
        status = await until_idle(engine)
        assert not status.totals.get("finished_length")
