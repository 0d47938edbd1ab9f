"""Dask collections as sources: a partition that differs from the collection's metadata costs its own rows only."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import dask
import dask.bag as db
import pytest
from distributed import Client
from test_batch_values import COLUMNS, rows

from distkv_dask.errors import SourceError
from tests._cluster import gen_cluster


def on_a_cluster(work: Callable[[Client], None]) -> Callable[[], None]:
    @gen_cluster(client=True, nthreads=[("127.0.0.1", 1)], timeout=60)
    async def run(client: Client, *_: Any) -> None:
        await asyncio.to_thread(work, client)

    return lambda: run()


def bags(client: Client) -> None:
    base = [{"text": "t", "n": number} for number in range(1000)]
    found = rows(
        db.from_sequence([*base, {"text": "t", "n": 1.5}, {"text": "t", "n": 3}], npartitions=3), client=client
    )
    assert found[:1000] == [({"n": number}, None) for number in range(1000)]
    assert found[1000] == ({"n": None}, "column 'n' should be int64: 1.5")
    assert found[1001] == ({"n": 3}, None)
    late = db.from_sequence([*base, {"text": "t", "n": 1, "late": "x"}, {"text": "t", "late": None}], npartitions=3)
    found = rows(late, client=client)
    assert "column 'late' is not among those of the first 1,000 records" in str(found[1000][1])
    assert found[1001] == ({"n": None}, None)
    assert rows(late, COLUMNS._replace(keep=("n",)), client=client)[1000] == ({"n": 1}, None)
    odd = [{"text": "t", 1: 2}, {"text": "t", 1: 3, "1": 4}, {"text": "t", "\ud800": 1}, {"text": 7}, 7, "t"]
    found = rows(db.from_sequence(odd, npartitions=2), client=client)
    assert found[0] == ({"1": 2}, None)
    assert found[5] == ({"1": None}, None)
    words = ["two keys", "is not text", "should be text: 7", "should be text: 7"]
    assert all(word in str(error) for word, (_, error) in zip(words, found[1:5], strict=True))


def frames(client: Client) -> None:
    pd = pytest.importorskip("pandas")
    dd = pytest.importorskip("dask.dataframe")
    from dask.delayed import delayed

    parts = [
        pd.DataFrame({"text": ["t"] * 2, "n": [1, 2], 0: ["a", "b"]}),
        pd.DataFrame({"text": ["t"] * 2, "n": [3.0, 3.5], 0: ["a", "b"]}),
        pd.DataFrame({"text": ["t"] * 2, "n": ["x", None], 0: [None, "b"]}),
        pd.DataFrame({"text": ["t"], 0: ["c"]}),
        pd.DataFrame({"text": ["t"], "n": [4], 0: [["a", 1]]}),
    ]
    lazy = dd.from_delayed([delayed(part) for part in parts], meta=parts[0], verify_meta=False)
    found = rows(lazy, client=client)
    assert [kept["n"] for kept, _ in found] == [1, 2, 3, None, None, None, None, 4]
    assert [error is None for _, error in found] == [True, True, True, False, False, True, False, False]
    assert found[3][1] == "column 'n' should be int64: 3.5"
    assert found[6][1] == "the row's partition has no column 'n'"
    objects = pd.DataFrame({"text": ["t"] * 3, "o": pd.Series([1, {"a": [2]}, "x"], dtype=object)})
    with dask.config.set({"dataframe.convert-string": False}):
        assert [kept["o"] for kept, _ in rows(dd.from_pandas(objects, npartitions=2), client=client)] == [
            "1",
            '{"a": [2]}',
            "x",
        ]
    twice = pd.DataFrame([["t", 1, 2]], columns=["text", 1, "1"])
    with pytest.raises(SourceError, match="2 columns called"):
        rows(dd.from_pandas(twice, npartitions=1), client=client)


test_records_of_a_bag_keep_their_values_or_are_errors = on_a_cluster(bags)
test_frames_keep_their_values_or_are_errors = on_a_cluster(frames)
