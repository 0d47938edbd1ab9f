"""CSV and JSONL as spreadsheets and other tools write them: encodings, delimiters, quotes, compression, folders."""

from __future__ import annotations

import bz2
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from distkv_dask.client.batch import text_tables
from distkv_dask.errors import SourceError
from tests.client.test_batch_values import COLUMNS, rows

TEXT = 'text{0}note\nété{0}"a ""b"""\nzwei{0}☃\n'
EXPECTED = [({"note": 'a "b"'}, None), ({"note": "☃"}, None)]
COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: bytes(pa.Codec("zstd").compress(data)),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_a_csv_is_read_in_its_encoding_and_with_its_delimiter(encoding: str, delimiter: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(TEXT.format(delimiter), encoding)
    assert rows(tmp_path / "t.csv") == EXPECTED
    (tmp_path / "t.csv").write_text(f"sep={delimiter}\r\n" + TEXT.format(delimiter), encoding)
    assert rows(tmp_path / "t.csv") == EXPECTED


def test_a_delimiter_within_names_or_values_is_none(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("a,b;c\ttext\n1;2,3\tt\n")
    assert rows(tmp_path / "t.tsv") == [({"a,b;c": "1;2,3"}, None)]
    (tmp_path / "t.csv").write_text('"a;text",text\nx;y,t\n')
    assert rows(tmp_path / "t.csv") == [({"a;text": "x;y"}, None)]


@pytest.mark.parametrize("ending", COMPRESSED)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_compressed_files_are_read_and_cut_ones_end_in_an_error(ending: str, encoding: str, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"{at * 7919 % 10007}", "n": at}) + "\n" for at in range(5000)).encode()
    data = COMPRESSED[ending](lines.decode().encode(encoding))
    (tmp_path / f"t.jsonl{ending}").write_bytes(data)
    found = rows(tmp_path / f"t.jsonl{ending}")
    assert found == [({"n": at}, None) for at in range(5000)]
    (tmp_path / f"u.csv{ending}").write_bytes(COMPRESSED[ending](TEXT.format(";").encode(encoding)))
    assert rows(tmp_path / f"u.csv{ending}") == EXPECTED
    if ending:
        (tmp_path / f"t.jsonl{ending}").write_bytes(data[:-9])
        found = rows(tmp_path / f"t.jsonl{ending}")
        assert found[-1][1] is not None
        assert "cannot be read" in found[-1][1]
        assert found[:-1] == [({"n": at}, None) for at in range(len(found) - 1)]


def test_a_quote_that_is_not_closed_costs_its_row_alone(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('text,n\nt,1\n"open,2\nt,3\nt,4\n')
    assert [kept["n"] for kept, error in rows(path) if error is None] == ["1", "3", "4"]
    assert "a quote" in str(rows(path)[1][1])
    path.write_text('text,n\nt,1\nt,"open\n"t","3"\n"a\nb",4\n')
    assert [kept["n"] for kept, error in rows(path) if error is None] == ["1", "3", "4"]
    assert "a quote" in str(rows(path)[1][1])
    path.write_text("text,n\n" + 't,"\n' * 3001)
    assert len(rows(path)) >= 1500
    path.write_text("text,n\n" + '"t"x,1\n' * 30_000)
    assert sum(error is not None for _, error in rows(path)) == 30_000
    path.write_text('text,"n\nt,1\n')
    with pytest.raises(SourceError, match="no line of column names"):
        rows(path)


def test_rows_without_end_are_errors_and_the_next_ones_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_tables, "LONGEST_TEXT", 100)
    (tmp_path / "t.jsonl").write_text("\n".join(['{"text": "t"}', '{"text": "' + "x" * 350 + '"}', '{"text": "t"}']))
    assert [error is None for _, error in rows(tmp_path / "t.jsonl")] == [True, False, True]
    (tmp_path / "t.csv").write_text('text,n\nt,1\n"' + "x\n" * 60 + '",2\nt,3\n' + "y" * 350 + ",4\nt,5\n")
    found = rows(tmp_path / "t.csv")
    assert found[0] == ({"n": "1"}, None)
    assert found[-1] == ({"n": "5"}, None)
    assert ({"n": "3"}, None) in found
    assert "more than" in str(found[1][1])


def test_folders_of_tables_are_one_table(tmp_path: Path) -> None:
    for kind, lines in {
        "jsonl": ['{"text": "t", "n": 1}', '{"text": "t", "n": 1.5, "m": "x"}'],
        "csv": ["text,n\nt,1\n", "m;text\nx;t\n"],
    }.items():
        folder = tmp_path / kind
        (folder / "year=2023").mkdir(parents=True)
        (folder / "year=2024" / "_temporary").mkdir(parents=True)
        (folder / "year=2023" / f"a.{kind}").write_text(lines[0])
        (folder / "year=2024" / f"b.{kind}.gz").write_bytes(gzip.compress(lines[1].encode()))
        (folder / "year=2024" / f".b.{kind}.gz.crc").write_bytes(b"crc")
        (folder / "year=2024" / "_temporary" / f"c.{kind}").write_text("half")
        (folder / "_SUCCESS").touch()
        (folder / f"empty.{kind}").touch()
        (folder / f"gone.{kind}").symlink_to(tmp_path / "nowhere")
    found = rows(tmp_path / "jsonl")
    assert "gone.jsonl cannot be read" in next(error for _, error in found if error)
    assert [kept for kept, error in found if error is None] == [
        {"n": 1.0, "m": None, "year": 2023},
        {"n": 1.5, "m": "x", "year": 2024},
    ]
    found = rows(tmp_path / "csv")
    assert "gone.csv" in next(error for _, error in found if error)
    assert [kept for kept, error in found if error is None] == [
        {"n": "1", "year": "2023", "m": None},
        {"n": None, "year": "2024", "m": "x"},
    ]
    (tmp_path / "csv" / "x.jsonl").write_text("{}")
    with pytest.raises(SourceError, match=r"CSV .* and JSONL .*: separate them"):
        rows(tmp_path / "csv")


def test_a_file_that_is_no_text_has_errors_and_ends(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(b"\xff\xfe" + '{"text": "t"}\n'.encode("utf-16-le") + b"\x00\xd8\n\x00{")
    assert [error is None for _, error in rows(tmp_path / "t.jsonl")][:2] == [True, False]
    (tmp_path / "t.csv").write_bytes(b"")
    with pytest.raises(SourceError, match="is empty"):
        rows(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_bytes(b"text,\xff\nt,1\n")
    with pytest.raises(SourceError, match="not UTF-8"):
        rows(tmp_path / "t.csv", COLUMNS)
