"""Values of a source come out unchanged, or give an error of their row that names the column."""

from __future__ import annotations

import csv
import datetime as dt
import decimal
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distkv_dask.client.batch.sources import open_source
from distkv_dask.client.batch.tables import Columns
from distkv_dask.errors import InvalidRequestError, SourceError

COLUMNS = Columns("text", None, ("text",))
BASE = [{"text": "t", "n": number} for number in range(1001)]


def rows(source: Any, columns: Columns = COLUMNS, *, client: Any = None) -> list[tuple[dict[str, Any], str | None]]:
    """The kept values of each row, and its error; collections need a ``client``."""
    found: list[tuple[dict[str, Any], str | None]] = []
    opened = open_source(source, columns, client)
    for row in opened.rows():
        try:
            row.read()
        except InvalidRequestError as error:
            found.append((row.kept.to_pylist()[0], str(error)))
        else:
            found.append((row.kept.to_pylist()[0], None))
        assert row.kept.schema.equals(opened.kept)
    assert opened.count() in (None, len(found))
    return found


def jsonl(folder: Path, records: list[Any]) -> Path:
    lines = [one if isinstance(one, str) else json.dumps(one) for one in records]
    (folder / "t.jsonl").write_text("\n".join(lines))
    return folder / "t.jsonl"


def equal(value: Any, found: Any) -> bool:
    """Whether values are equal and of the same kind; JSON texts are compared by content."""
    if isinstance(value, dict | list):
        return isinstance(found, str) and repr(json.loads(found)) == repr(value)
    if isinstance(value, float) and value != value:
        return bool(found != found)
    return bool(found == value) and isinstance(found, bool) == isinstance(value, bool)


@pytest.mark.parametrize(
    "later",
    [
        [1.5],
        [2**63],
        [2**63, -1],
        [2**70],
        [None, 7, float("inf")],
        [-0.25, 2**53],
    ],
    ids=str,
)
def test_numbers_that_come_late_widen_their_column(later: list[Any], tmp_path: Path) -> None:
    found = rows(jsonl(tmp_path, [*BASE, *({"text": "t", "n": one} for one in later)]))
    assert all(error is None for _, error in found)
    assert [kept["n"] for kept, _ in found] == [*range(1001), *later]


@pytest.mark.parametrize("late", ["x", True, {"a": 1}, [1], 10**400], ids=lambda late: str(late)[:10])
def test_another_kind_that_comes_late_is_refused_by_name(late: Any, tmp_path: Path) -> None:
    found = rows(jsonl(tmp_path, [*BASE, {"text": "t", "n": late}]))
    assert [kept["n"] for kept, _ in found] == [*range(1001), None]
    assert found[-1][1] is not None
    assert found[-1][1].startswith(f"column 'n' should be int64: {late!r}"[:60])


@pytest.mark.parametrize(
    "line",
    ['{"n": 1e400}', '{"n": -1e999}', '{"n": 1e-400}', '{"n": 9007199254740993}', '{"n": 1, "n": 2}',
     '{"n": ' + "[" * 99_999, '{"m": {"a": 1, "a": 2}}',
     '{"m": "\\ud800"}', '{"m": {"a": "\\udfff"}}', '{"\\ud800": 1}'],
    ids=lambda line: line[:20],
)  # fmt: skip
def test_what_no_column_can_hold_is_refused(line: str, tmp_path: Path) -> None:
    good = {"text": "t", "n": 1.5, "m": "é"}
    found = rows(jsonl(tmp_path, [good, line.replace("{", '{"text": "t", ', 1), good]))
    assert [error is None for _, error in found] == [True, False, True]
    assert found[0] == found[2] == ({"n": 1.5, "m": "é"}, None)
    assert set(found[1][0].values()) == {None} or found[1][0] == {"n": None, "m": None}


def test_columns_that_appear_late_are_there(tmp_path: Path) -> None:
    found = rows(jsonl(tmp_path, [*BASE, {"text": "t", "n": 1, "late": "x"}]))
    assert found[0][0] == {"n": 0, "late": None}
    assert found[-1] == ({"n": 1, "late": "x"}, None)


def test_keys_without_end_are_refused_before_they_fill_the_memory(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="different keys"):
        rows(jsonl(tmp_path, [{"text": "t", f"k{number}": 1} for number in range(10_001)]))


def test_text_in_csv_stays_as_it_is(tmp_path: Path) -> None:
    values = [
        "007",
        "12345678901234567890123",
        "NA",
        "null",
        "",
        "1e5",
        "01.02.2020",
        "true",
        " x ",
        "=1+1",
        '"',
        "a\r\nb",
    ]
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "v"], *(["t", value] for value in values)])
    assert rows(tmp_path / "t.csv") == [({"v": value}, None) for value in values]


def test_two_columns_of_one_name_are_named_unless_they_are_left_out(tmp_path: Path) -> None:
    pd = pytest.importorskip("pandas")
    (tmp_path / "t.csv").write_text("text,a,a\nt,1,2\n")
    table = pa.Table.from_arrays([pa.array(["t"]), pa.array([1]), pa.array([2])], names=["text", "a", "a"])
    pq.write_table(table, tmp_path / "t.parquet")
    frame = pd.DataFrame([["t", 1, 2]], columns=["text", "a", "a"])
    likewise = pd.DataFrame([["t", 1, 2]], columns=["text", 1, "1"])
    for source in (tmp_path / "t.csv", tmp_path / "t.parquet", table, frame, likewise):
        with pytest.raises(SourceError, match="2 columns called"):
            rows(source)
        assert rows(source, COLUMNS._replace(keep=())) == [({}, None)]


def test_pandas_columns_may_be_called_anything() -> None:
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame([["t", 1, 2.5]], columns=["text", 0, (1, "x")])
    assert rows(frame) == [({"0": 1, "(1, 'x')": 2.5}, None)]
    assert rows(frame, Columns("0", ("text",), ("0",)))[0][1] == "column '0' should be text: 1"


def test_what_pandas_calls_objects_keeps_its_values() -> None:
    pd = pytest.importorskip("pandas")
    numpy = pytest.importorskip("numpy")
    columns: dict[str, list[Any]] = {
        "numbers": [1, 1.5, None],
        "text": ["t", "t", "t"],
        "long": [numpy.arange(3000), [1], None],
        "unlike": [{"a": 1}, "x", True],
        "dates": [dt.date(1, 1, 1), dt.date(9999, 12, 31), None],
        "decimals": [decimal.Decimal("1.10"), decimal.Decimal("2.205"), None],
    }
    found = rows(pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in columns.items()}))
    assert all(error is None for _, error in found)
    assert found[0][0]["long"] == list(range(3000))
    assert [kept["unlike"] for kept, _ in found] == ['{"a": 1}', "x", "true"]
    for name in ("numbers", "dates", "decimals"):
        assert [kept[name] for kept, _ in found] == columns[name]
    halves = pd.DataFrame({"text": ["t", "t"], "o": pd.Series(["x", "\udfff"], dtype=object)})
    assert rows(halves) == [({"o": "x"}, None), ({"o": None}, "column 'o' should be string: '\\udfff'")]


BERLIN = dt.datetime(1970, 1, 1, 0, 0, 0, 1, dt.UTC)
ARROW: list[tuple[Callable[[], pa.Array], list[Any]]] = [
    (lambda: pa.array(["a", None], pa.string_view()), ["a", None]),
    (lambda: pa.array([b"\xff", None], pa.binary_view()), [b"\xff", None]),
    (lambda: pa.array(["a", None], pa.large_string()), ["a", None]),
    (lambda: pa.array(["a", None]).dictionary_encode(), ["a", None]),
    (lambda: pa.RunEndEncodedArray.from_arrays([1, 2], ["a", "b"]), ["a", "b"]),
    (lambda: pa.array([None, None]), [None, None]),
    (lambda: pa.array([1, None], pa.timestamp("us", "Europe/Berlin")), [BERLIN, None]),
    (lambda: pa.array([{"a": [1]}, None]), [{"a": [1]}, None]),
    (lambda: pa.array([decimal.Decimal("1.50"), None], pa.decimal256(70, 2)), [decimal.Decimal("1.50"), None]),
]  # fmt: skip


@pytest.mark.parametrize(("make", "expected"), ARROW)
def test_every_type_of_arrow_reaches_the_output(
    make: Callable[[], pa.Array], expected: list[Any], tmp_path: Path
) -> None:
    source = pa.table({"text": ["t", "t"], "x": make()})
    opened = open_source(source, COLUMNS, None)  # type: ignore[arg-type]
    batches = [row.kept for row in opened.rows()]
    pq.write_table(pa.Table.from_batches(batches, opened.kept), tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet")["x"].to_pylist() == expected


def test_a_type_that_parquet_lacks_is_named_before_anything_runs() -> None:
    table = pa.table({"text": ["t"], "x": pa.array([(1, 2, 3)], pa.month_day_nano_interval())})
    with pytest.raises(SourceError, match=r"column 'x' of type .* cannot go to the output"):
        rows(table)
    assert rows(table, COLUMNS._replace(keep=())) == [({}, None)]


def test_text_that_is_not_utf8_is_an_error_of_its_row() -> None:
    broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xff"]).buffers())
    assert rows(pa.table({"text": ["t", "t"], "x": broken})) == [
        ({"x": "ok"}, None),
        ({"x": None}, rows(pa.table({"text": ["t", "t"], "x": broken}))[1][1]),
    ]
    assert rows(pa.table({"text": ["t", "t"], "x": broken}))[1][1].startswith("column 'x'")  # type: ignore[union-attr]


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**80), 2**80), st.integers(-5, 5), st.floats(), st.text(max_size=5)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner), max_leaves=4
)
CELLS = st.lists(
    st.one_of(SCALARS, VALUES, *(st.lists(one, min_size=3, max_size=3) for one in (st.integers(), st.floats()))),
    min_size=1,
    max_size=8,
)


def are_several(values: list[Any]) -> bool:
    """Whether JSON texts are needed: no column type holds all these numbers, or there are other values."""
    wide = any(type(value) is int and not -(2**63) <= value < 2**64 for value in values)
    kinds = {type(value) for value in values if value is not None}
    return len(kinds - {int, float}) > 0 or (wide and float in kinds)


@settings(deadline=None, max_examples=150)
@given(CELLS)
@example([-(2**63) - 1, 0.0])
@example([2**64, 0.5, None])
def test_any_json_value_comes_out_equal_or_as_an_error(values: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = rows(jsonl(Path(folder), [{"text": "t", "v": value} for value in values]))
    assert len(found) == len(values)
    several = are_several(values)
    for value, (kept, error) in zip(values, found, strict=True):
        assert (
            error is not None
            or equal(value, kept["v"])
            or (several and isinstance(kept["v"], str) and equal(value, json.loads(kept["v"])))
        )


@settings(deadline=None, max_examples=150)
@given(CELLS)
def test_any_object_of_a_pandas_frame_comes_out_equal_or_as_an_error(values: list[Any]) -> None:
    pd = pytest.importorskip("pandas")
    found = rows(pd.DataFrame({"text": ["t"] * len(values), "v": pd.Series(values, dtype=object)}))
    for value, (kept, error) in zip(values, found, strict=True):
        missing = isinstance(value, float) and value != value and kept["v"] is None
        same = kept["v"] == value and isinstance(kept["v"], bool) == isinstance(value, bool)
        assert error is not None or missing or same or repr(json.loads(kept["v"])) == repr(value)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.sampled_from([pa.int8(), pa.int64(), pa.uint64(), pa.float32(), pa.float64(), pa.string(), pa.large_string(),
                         pa.bool_(), pa.binary(), pa.timestamp("s"), pa.timestamp("ns"), pa.timestamp("us", "UTC"),
                         pa.date32(), pa.decimal128(12, 2), pa.list_(pa.int64()), pa.list_(pa.float64())]),
        min_size=1, max_size=4,
    ),
    st.data(),
)  # fmt: skip
def test_any_parquet_files_of_one_folder_come_out_equal_or_as_errors(kinds: list[pa.DataType], data: Any) -> None:
    expected: list[Any] = []
    with tempfile.TemporaryDirectory() as name:
        for at, kind in enumerate(kinds):
            column = data.draw(arrays(kind))
            expected += column.to_pylist()
            pq.write_table(pa.table({"text": ["t"] * len(column), "v": column}), f"{name}/{at}.parquet")
        found = rows(Path(name))
    assert len(found) == len(expected)
    assert all(
        error is not None or equal_cell(value, kept["v"]) for value, (kept, error) in zip(expected, found, strict=True)
    )


def equal_cell(value: Any, found: Any) -> bool:
    return bool(found == value) or (value != value and found != found) or repr(found) == repr(value)


@st.composite
def arrays(draw: Any, kind: pa.DataType) -> pa.Array:
    numbers = st.integers(-(2**63), 2**63 - 1)
    values: Any = {
        pa.int8(): st.integers(-128, 127),
        pa.int64(): numbers,
        pa.uint64(): st.integers(0, 2**64 - 1),
        pa.float32(): st.floats(width=32),
        pa.float64(): st.floats(),
        pa.bool_(): st.booleans(),
        pa.binary(): st.binary(max_size=4),
        pa.date32(): st.dates(),
        pa.decimal128(12, 2): st.decimals("-9999", "9999", places=2),
        pa.timestamp("s"): st.datetimes(dt.datetime(1000, 1, 1)).map(lambda one: one.replace(microsecond=0)),
        pa.timestamp("ns"): st.datetimes(dt.datetime(1700, 1, 1), dt.datetime(2250, 1, 1)),
        pa.timestamp("us", "UTC"): st.datetimes(dt.datetime(1000, 1, 1), timezones=st.just(dt.UTC)),
        pa.list_(pa.int64()): st.lists(numbers, max_size=2),
        pa.list_(pa.float64()): st.lists(st.floats(allow_nan=False), max_size=2),
    }.get(kind, st.text(max_size=4))
    return pa.array(draw(st.lists(st.none() | values, max_size=5)), kind)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), min_size=2, max_size=2), max_size=6
    ),
    st.sampled_from(",;\t|"),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_any_text_in_any_csv_comes_out_equal(
    cells: list[list[str]], delimiter: str, encoding: str, quoting: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "t.csv")
        with path.open("w", encoding=encoding, newline="") as file:
            csv.writer(file, delimiter=delimiter, quoting=quoting).writerows(
                [["text", "a", "b"], *(["t", *one] for one in cells)]
            )
        assert rows(path) == [({"a": a, "b": b}, None) for a, b in cells]
