"""Every kind of source gives the same rows, and a fault in one row is an error of that row only."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.bag as db
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client

from distkv_dask.client.batch.rows import Source
from distkv_dask.client.batch.sources import open_source
from distkv_dask.client.batch.tables import Columns
from distkv_dask.errors import InvalidRequestError, SourceError
from tests._cluster import gen_cluster
from tests._pdf import save_pdf

TEXTS = ["one", 'two, "quoted"\nand a second line', "trois été ☃", "four " * 40_000]
TABLE = pa.table({"id": ["a", "b", "c", "d"], "text": TEXTS, "pages": [1, 2, 3, None]})
COLUMNS = Columns("text", None, ("text", "pages"))


def parquet(folder: Path) -> Path:
    pq.write_table(TABLE, folder / "table.parquet", row_group_size=3)
    return folder / "table.parquet"


def parquet_folder(folder: Path) -> Path:
    pq.write_table(TABLE.slice(0, 1), folder / "1.parquet")
    pq.write_table(TABLE.slice(1), folder / "2.parquet")
    (folder / "_SUCCESS").touch()
    return folder


def jsonl(folder: Path) -> Path:
    lines = [json.dumps(row) for row in TABLE.to_pylist()]
    (folder / "table.jsonl").write_text("\n\n".join(lines))
    return folder / "table.jsonl"


def pandas(folder: Path) -> Any:
    pytest.importorskip("pandas")
    return TABLE.to_pandas()


def pandas_of_objects(folder: Path) -> Any:
    return pandas(folder).astype({"text": object, "id": object})


KINDS: list[Callable[[Path], Any]] = [parquet, parquet_folder, jsonl, lambda _: TABLE, pandas, pandas_of_objects]


def read(source: Source) -> list[Any]:
    """Label, kept columns and text of each row, or its error instead of the text."""
    found = []
    for row in source.rows():
        try:
            text = row.read().values["text"]
        except InvalidRequestError as error:
            text = f"! {error}"
        found.append((row.label, *row.kept.to_pylist()[0].values(), text))
    return found


def opened(source: Any, columns: Columns = COLUMNS) -> Source:
    return open_source(source, columns, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_table_gives_the_same_rows_whatever_it_is_kept_in(kind: Any, tmp_path: Path) -> None:
    source = opened(kind(tmp_path))
    expected = [(at, row["id"], row["pages"], row["text"]) for at, row in enumerate(TABLE.to_pylist())]
    assert read(source) == expected
    assert read(source) == expected  # a second pass starts over
    assert source.count() == 4
    assert source.kept.names == ["id", "pages"]
    prints = [row.fingerprint for row in source.rows()]
    assert len(set(prints)) == 4
    assert prints == [row.fingerprint for row in opened(kind(tmp_path)).rows()]


def test_a_csv_file_gives_the_same_rows_with_all_values_as_text(tmp_path: Path) -> None:
    with (tmp_path / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([TABLE.column_names, *([row["id"], row["text"], row["pages"]] for row in TABLE.to_pylist())])
    source = opened(tmp_path / "table.csv")
    assert read(source) == [
        (at, row["id"], str(row["pages"] or ""), row["text"]) for at, row in enumerate(TABLE.to_pylist())
    ]
    assert source.count() == 4


@gen_cluster(client=True, nthreads=[("127.0.0.1", 1)], timeout=60)
async def test_dask_collections_give_the_same_rows_partition_by_partition(client: Client, *_: Any) -> None:
    dd = pytest.importorskip("dask.dataframe")
    import asyncio

    def work() -> None:
        expected = read(opened(TABLE))
        for source in (dd.from_pandas(TABLE.to_pandas(), npartitions=3), db.from_sequence(TABLE.to_pylist(), 3)):
            assert read(open_source(source, COLUMNS, client)) == expected
        texts = open_source(db.from_sequence(TEXTS, 2), COLUMNS._replace(template=("text",)), client)
        assert read(texts) == list(enumerate(TEXTS))

    await asyncio.to_thread(work)


def test_a_folder_of_documents_is_read_by_what_each_file_is(tmp_path: Path) -> None:
    page = (
        "<html><head><title>no</title><style>p {}</style></head><body><p>one&nbsp;&amp; two<p>three <b>four</b></body>"
    )
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "page.HTML").write_text(page)
    (tmp_path / "latin.html").write_bytes(b'<meta charset="latin-1"><p>\xe9t\xe9')
    (tmp_path / "a.txt").write_text("\N{ZERO WIDTH NO-BREAK SPACE}plain", "utf-8")
    (tmp_path / "b.md").write_text("# Title")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "picture.png").write_bytes(b"no")
    found = dict(read(opened(tmp_path)))
    assert found.pop("bad.txt").startswith("! the file is not text in utf-8")
    assert found == {
        "a.txt": "plain",
        "b.md": "# Title",
        "deep/page.HTML": "no\none & two\nthree four",
        "latin.html": "été",
    }
    assert read(opened(tmp_path / "b.md")) == [("b.md", "# Title")]


def test_pdfs_give_their_text_and_a_damaged_or_scanned_one_an_error(tmp_path: Path) -> None:
    save_pdf(tmp_path / "scanned.pdf", [""])
    save_pdf(tmp_path / "good.pdf", ["Hello from a page", "and another"])
    (tmp_path / "damaged.pdf").write_bytes(b"%PDF-1.7 nothing")
    found = dict(read(opened(tmp_path)))
    assert found["good.pdf"] == "Hello from a page\n\fand another\n\f"
    assert found["damaged.pdf"].startswith("! the PDF cannot be read")
    assert found["scanned.pdf"].startswith("! the PDF holds no text")


def test_a_bad_row_is_an_error_of_that_row_alone(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good", "id": 1}',
        b"{not json",
        b'{"text": null, "id": 2}',
        b'{"text": 7, "id": 3}',
        b'{"id": 4}',
        b'{"text": "\xff", "id": 5}',
        b'{"text": "\\ud800", "id": 6}',
        b"[1]",
        b'{"text": "wrong id", "id": "x"}',
        b'{"text": "good too", "id": 9}',
    ]
    (tmp_path / "t.jsonl").write_bytes(b"\n".join(lines[:8] + [lines[9]] * 1001 + lines[8:]))
    found = read(opened(tmp_path / "t.jsonl", Columns("text", None, ("text",))))
    words = [
        "not JSON",
        "empty (null)",
        "should be text: 7",
        "empty (null)",
        "not UTF-8",
        "not UTF-8",
        "not a JSON object",
    ]
    assert all(word in row[-1] and row[-1].startswith("! ") for word, row in zip(words, found[1:8], strict=True))
    assert found[-2][-1] == "! column 'id' should be int64: 'x'"
    assert (found[0], found[-1]) == ((0, 1, "good"), (1010, 9, "good too"))

    table = pa.table(
        {"text": pa.array([b"good", b"\xff"], pa.binary()), "id": pa.array(["x", "x"]).dictionary_encode()}
    )
    found = read(opened(table, Columns("text", None, ("text",))))
    assert found[0] == (0, "x", "good")
    assert "not UTF-8" in found[1][-1]

    (tmp_path / "t.csv").write_bytes(b"text,id\ngood,1\n\xff,2\ntoo,many,3\ngood,4\n")
    found = read(opened(tmp_path / "t.csv", Columns("text", None, ("text",))))
    assert [row[-1][:9] for row in found] == ["good", "! the row", "! the row", "good"]


def test_mixed_values_in_a_pandas_column_cost_only_the_rows_that_are_no_text() -> None:
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"text": pd.Series(["good", 3, None, float("nan")], dtype=object), "n": [1, 2, 3, 4]})
    found = read(opened(frame, Columns("text", None, ("text",))))
    assert [row[:2] for row in found] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert [row[-1] for row in found] == ["good", "! column 'text' should be text: 3"] + [
        "! column 'text' is empty (null)"
    ] * 2


def test_a_source_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"nothing")
    (tmp_path / "t.xyz").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "a.txt").touch()
    parquet(tmp_path / "both")
    for source, words in [
        (tmp_path / "no.csv", "does not exist"),
        (tmp_path / "t.parquet", "cannot be read as Parquet"),
        (tmp_path / "t.xyz", "not of a kind that can be read"),
        (tmp_path / "empty", "holds no documents"),
        (tmp_path / "both", "separate them"),
        (7, "not int"),
    ]:
        with pytest.raises(SourceError, match=words):
            opened(source)
    with pytest.raises(SourceError, match=r"no column .body.\. Its columns are: id, text, pages"):
        opened(TABLE, Columns("body", None, ("body",)))
