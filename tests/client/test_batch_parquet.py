"""Parquet folders as other tools write them; damaged parts cost their own rows only."""

from __future__ import annotations

import datetime as dt
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distkv_dask.client.batch.sources import open_source
from distkv_dask.errors import InvalidRequestError, SourceError
from tests.client.test_batch_values import COLUMNS, rows


def write(path: Path, **columns: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": ["t"] * len(next(iter(columns.values()))), **columns}), path)  # type: ignore[call-overload]


def test_folders_are_columns_as_hive_means_them(tmp_path: Path) -> None:
    table = pa.table(
        {"text": ["t"] * 4, "n": range(4), "year": [2023, 2024, None, 2024], "at": ["a b/c", "é=%", "x", None]}
    )
    partitioning = ds.partitioning(table.select(["year", "at"]).schema, flavor="hive")
    ds.write_dataset(table, tmp_path, format="parquet", partitioning=partitioning)
    found = sorted((kept for kept, _ in rows(tmp_path)), key=lambda kept: kept["n"])
    assert found == table.drop_columns("text").to_pylist()
    write(tmp_path / "code" / "code=007" / "0.parquet", n=[1])
    write(tmp_path / "code" / "code=8" / "0.parquet", n=[2])
    assert [kept for kept, _ in rows(tmp_path / "code")] == [{"n": 1, "code": "007"}, {"n": 2, "code": "8"}]
    write(tmp_path / "own" / "n=5" / "0.parquet", n=[1])
    assert rows(tmp_path / "own") == [({"n": 1}, None)]


def test_files_whose_columns_differ_are_one_table(tmp_path: Path) -> None:
    write(tmp_path / "0.parquet", x=pa.nulls(2), n=[1, 2], big=[1, 2])
    write(tmp_path / "1.parquet", x=["a", "b"], n=[0.5, 1e300], big=[2**53 + 1, 3])
    write(tmp_path / "2.parquet", late=["l"], n=pa.array([2**53 + 1]), x=["c"], big=pa.array([1.5]))
    write(tmp_path / "3.parquet", x=[b"bytes"], n=["text"], big=[None])
    write(tmp_path / "4.parquet", n=pa.array([], pa.int32()))
    found = rows(tmp_path)
    assert [kept["x"] for kept, _ in found] == [None, None, "a", "b", "c", None]
    assert [kept["n"] for kept, _ in found] == [1, 2, 0.5, 1e300, None, None]
    assert [kept["late"] for kept, _ in found] == [None] * 4 + ["l", None]
    assert [kept["big"] for kept, _ in found] == [1, 2, None, 3, 1.5, None]
    assert found[2][1] == "column 'big' should be double: 9007199254740993"
    assert found[4][1] == "column 'n' should be double: 9007199254740993"
    assert found[5][1] in ("column 'n' should be double: 'text'", "column 'x' should be string: b'bytes'")
    assert [error is None for _, error in found] == [True, True, False, True, False, False]


def test_a_damaged_file_among_good_ones_costs_its_own_rows(tmp_path: Path) -> None:
    for name in ("0", "1", "2", "3", "4"):
        write(tmp_path / f"{name}.parquet", n=[int(name)] * 200)
    (tmp_path / "0.parquet").write_bytes((tmp_path / "0.parquet").read_bytes()[:-10])
    (tmp_path / "2.parquet").write_bytes(b"")
    (tmp_path / "5.parquet").symlink_to(tmp_path / "nowhere")
    (tmp_path / "6.parquet").symlink_to(tmp_path / "6.parquet")
    os.mkfifo(tmp_path / "7.parquet")
    (tmp_path / "8.parquet").mkdir()
    write(tmp_path / "8.parquet" / "inner.parquet", n=[8])
    write(tmp_path / "_temporary" / "x.parquet", n=[9])
    write(tmp_path / ".hidden" / "x.parquet", n=[9])
    for name in ("_SUCCESS", "_metadata", ".0.parquet.crc", "_common_metadata"):
        (tmp_path / name).write_bytes(b"x")
    found = rows(tmp_path)
    assert [kept["n"] for kept, error in found if error is None] == [1] * 200 + [3] * 200 + [4] * 200 + [8]
    errors = [error for _, error in found if error is not None]
    assert [error.split(" cannot")[0] for error in errors] == [f"file {at}.parquet" for at in (0, 2, 5, 6, 7)]
    for path in tmp_path.glob("[1-9].parquet"):
        if path.is_file():
            path.unlink()
    (tmp_path / "8.parquet" / "inner.parquet").unlink()
    with pytest.raises(SourceError, match="cannot be read as Parquet"):
        rows(tmp_path)


def test_damaged_pages_cost_the_rows_of_their_row_group(tmp_path: Path) -> None:
    table = pa.table({"text": ["t"] * 300, "n": list(range(300))})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=100, compression="snappy", use_dictionary=False)
    column = pq.ParquetFile(tmp_path / "t.parquet").metadata.row_group(1).column(1)
    data = bytearray((tmp_path / "t.parquet").read_bytes())
    start = column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    (tmp_path / "t.parquet").write_bytes(data)
    found = rows(tmp_path / "t.parquet")
    assert len(found) == 300
    assert [kept["n"] for kept, error in found if error is None] == [*range(100), *range(200, 300)]


@pytest.mark.parametrize("unit", ["us", "ns"])
def test_int96_times_of_any_year_come_out_as_they_are(unit: str, tmp_path: Path) -> None:
    times = [dt.datetime(1, 1, 1), dt.datetime(1676, 1, 1), dt.datetime(2000, 1, 2, 3, 4, 5, 678901), None]
    times += [dt.datetime(2263, 1, 1), dt.datetime(9999, 12, 31, 23, 59, 59, 999999)]
    if unit == "ns":
        times = times[2:4]
    table = pa.table({"text": ["t"] * len(times), "at": pa.array(times, pa.timestamp(unit))})
    pq.write_table(table, tmp_path / "t.parquet", use_deprecated_int96_timestamps=True)
    assert rows(tmp_path / "t.parquet") == [({"at": time}, None) for time in times]


def test_int96_times_that_microseconds_cannot_hold_are_refused(tmp_path: Path) -> None:
    times = pa.array([1_000_000_001, 1_000_000_000], pa.timestamp("ns"))
    pq.write_table(
        pa.table({"text": ["t", "t"], "at": times}), tmp_path / "t.parquet", use_deprecated_int96_timestamps=True
    )
    (lost, error), good = rows(tmp_path / "t.parquet")
    assert lost == {"at": None}
    assert "nanoseconds" in str(error)
    assert good == ({"at": dt.datetime(1970, 1, 1, 0, 0, 1)}, None)


def test_names_that_are_not_utf8_are_read_and_never_the_same(tmp_path: Path) -> None:
    for name in (b"\xff.parquet", b"\xfe.parquet"):
        write(tmp_path / "plain.parquet", n=[name[0]])
        os.replace(tmp_path / "plain.parquet", os.fsencode(tmp_path) + b"/" + name)
    assert sorted(kept["n"] for kept, _ in rows(tmp_path)) == [254, 255]


END = 9_223_372_036_854
"""The last second that 64 bits of microseconds can hold in part."""

EARLIEST = -2_440_587 * 86_400
"""Seconds of INT96's second day; the first is pyarrow's 1970."""

TIMES = st.one_of(
    st.tuples(st.just("ns"), st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-3000, 3000) | st.none())),
    st.tuples(st.just("us"), st.lists(st.integers(EARLIEST * 10**6, 2**63 - 1) | st.none())),
    st.tuples(st.just("s"), st.lists(st.integers(EARLIEST, 10**14) | st.integers(-1, 1).map(END.__add__) | st.none())),
)
NESTS: dict[str, tuple[Callable[[Any], Any], Callable[[pa.DataType], pa.DataType]]] = {
    "list": (lambda one: [None, one], pa.list_),
    "large": (lambda one: [one, one], pa.large_list),
    "map": (lambda one: [("k", one), ("l", None)], lambda kind: pa.map_(pa.string(), kind)),
    "struct": (lambda one: {"n": 1, "at": one}, lambda kind: pa.struct([("n", pa.int8()), ("at", kind)])),
}


@given(TIMES, st.lists(st.sampled_from(list(NESTS)), max_size=3))
@settings(deadline=None)
def test_int96_times_within_nested_values_come_out_as_they_are_or_are_refused(
    times: tuple[str, list[int | None]], nests: list[str]
) -> None:
    def column(values: list[int | None], unit: str) -> pa.Array:
        made, kind = list[Any](values), pa.timestamp(unit)
        for nest in nests:
            made, kind = [NESTS[nest][0](one) for one in made], NESTS[nest][1](kind)
        return pa.array(made, kind)

    unit, values = times
    nanos = {"ns": 1, "us": 1000, "s": 10**9}[unit]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.parquet"
        table = pa.table({"text": ["t"] * len(values), "at": column(values, unit)})
        pq.write_table(table, path, use_deprecated_int96_timestamps=True)
        found = list(open_source(path, COLUMNS, None).rows())
    assert len(found) == len(values)
    for row, value in zip(found, values, strict=True):
        micros, cut = (0, 0) if value is None else divmod(value * nanos, 1000)
        if cut or not -(2**63) <= micros < 2**63:
            assert row.kept.column("at").to_pylist() == [None]
            with pytest.raises(InvalidRequestError, match="column 'at' holds an INT96 time"):
                row.read()
        else:
            assert row.kept.column("at").equals(column([value and micros], "us"))
            assert row.read()


def test_keys_and_pairs_of_int96_times_and_what_is_beside_them(tmp_path: Path) -> None:
    ns, year_one, later = pa.timestamp("ns"), dt.datetime(1, 1, 1), dt.datetime(2300, 1, 1)
    micros = {
        "a": pa.array([[(year_one, later)], None], pa.map_(pa.timestamp("us"), pa.timestamp("us"))),
        "a.b": pa.array([{"at": later, "nan": float("nan")}, None]),
        "pair": pa.array([[year_one, later], None], pa.list_(pa.timestamp("us"), 2)),
    }
    pq.write_table(
        pa.table({"text": ["t", "t"]} | micros), tmp_path / "t.parquet", use_deprecated_int96_timestamps=True
    )
    (kept, error), nothing = rows(tmp_path / "t.parquet")
    assert error is None
    assert kept["a"] == [(year_one, later)]
    assert kept["pair"] == [year_one, later]
    assert kept["a.b"]["at"] == later
    assert kept["a.b"]["nan"] != kept["a.b"]["nan"]
    assert nothing == ({"a": None, "a.b": None, "pair": None}, None)
    for name, column in {
        "key": pa.array([[(1, 1000)], [(1000, 1000)]], pa.map_(ns, ns)),
        "pair": pa.array([[1, 1000], [1000, 2000]], pa.list_(ns, 2)),
        "other": pa.ExtensionArray.from_storage(pa.opaque(ns, "a", "b"), pa.array([1, 1000], ns)),
    }.items():
        table = pa.table({"text": ["t", "t"], name: column})
        pq.write_table(table, tmp_path / "t.parquet", use_deprecated_int96_timestamps=True)
        found = rows(tmp_path / "t.parquet", COLUMNS._replace(keep=(name,)))
        assert [error is None for _, error in found] == [False, True]
        assert f"column {name!r} holds an INT96 time" in str(found[0][1])
        assert found[0][0] == {name: None}
