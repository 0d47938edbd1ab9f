"""A folder of documents as users have them: pages of every kind, links, odd names, and malicious files."""

from __future__ import annotations

import contextlib
import html
import os
import socket
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distkv_dask.client.batch.sources import open_source
from distkv_dask.client.batch.tables import Columns
from distkv_dask.client.documents import extract, readers
from distkv_dask.client.documents.extract import TextReader, plain_text
from distkv_dask.client.documents.prompts import read_text
from distkv_dask.client.files import label_of
from distkv_dask.errors import InvalidRequestError, MissingProgramError, SourceError
from tests._pdf import save_pdf

pytest.importorskip("selectolax")


READER = TextReader()


@pytest.fixture
def reader() -> TextReader:
    return READER


def documents(folder: Path) -> dict[str, str]:
    """Label and text of each file, or its error instead of the text."""
    found = {}
    for row in open_source(folder, Columns("text", None, ("text",)), None).rows():  # type: ignore[arg-type]
        try:
            text = row.read().values["text"]
        except InvalidRequestError as error:
            text = f"! {error}"
        assert row.label not in found
        found[str(row.label)] = text
    return found


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("<title>T</title><p>one<p>two <b>th</b>ree<br>four<div>five<ul><li>a<li>b</ul>",
         "T\none\ntwo three\nfour\nfive\na\nb"),
        ("<table><tr><td>1<td>2<tr><td>3</table>tail", "1\n2\n3\ntail"),
        ("a<script>no < no</script>b<style>no</style>c<!-- no --><template><p>no</template><noscript>no</noscript>d",
         "abcd"),
        ("a<iframe>no</iframe><textarea><b>yes</b></textarea><xmp><p>as is</xmp>", "a<b>yes</b>\n<p>as is"),
        ("<p>&lt;p&gt; &amp;amp; &#233;&eacute;&#x2603; &unknown; &#0; &copy",
         "<p> &amp; éé☃ &unknown; \N{REPLACEMENT CHARACTER} ©"),
        ("a\0b<p>\0</p>c", "ab\nc"),
        ("plain", "plain"),
        ("<p>  many \n\t spaces </p>\n\n<pre>a\n b</pre>", "many spaces\na b"),
        ("<!DOCTYPE html><html lang=de><head><meta name=x content='<p>'></head><body onload='<p>'>x", "x"),
        ("<svg><title>picture</title><text>in</text></svg><math><mi>x</mi></math>", "picture\ninx"),
        ("<a href='x>y'>link</a> <img alt='no'> <input value=no><button>yes", "link yes"),
        ("", ""),
    ],
)  # fmt: skip
def test_a_page_is_what_its_reader_sees(page: str, expected: str, reader: TextReader) -> None:
    assert reader.text(".html", page.encode()) == expected


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"<meta charset=utf-16><p>plain", "plain"),
        (b"<meta charset='iso-8859-1'><p>\x93\xe9\x94 \x80", "“é” €"),
        (b"<META HTTP-EQUIV='Content-Type' CONTENT='text/html; charset=latin1'>\x93", "“"),
        (b"<meta charset=us-ascii>\x85", "…"),
        (b"\xef\xbb\xbf<meta charset=iso-8859-1>\xc3\xa9", "é"),
        (b"\xff\xfe" + "<meta charset=utf-8>é".encode("utf-16-le"), "é"),
        (b"\xfe\xff" + "<p>é".encode("utf-16-be"), "é"),
        ("<p>é ☃".encode("utf-16-le"), "é ☃"),
        (b"<meta charset='undefined'>\xc3\xa9", "é"),
        (b"<meta charset='undefined'>\xe9", "é"),
        (b"<meta charset='no such'>\xe9", "é"),
        (b"<meta charset=''>x", "x"),
        (b"\xe9t\xe9 without a word", "été without a word"),
        (b"<!-- <meta charset=shift_jis> --><meta charset = windows-1251>\xe0", "\N{CYRILLIC SMALL LETTER A}"),
        (b"<?xml version='1.0' encoding='windows-1251'?><p>\xe0", "\N{CYRILLIC SMALL LETTER A}"),
        (b"<meta charset=shift_jis>" + "日本".encode("shift_jis"), "日本"),
        (b"<meta charset=x-user-defined>\xe9", "é"),
        (b"<meta charset=base64>aGk=", "aGk="),
        (b"<meta charset=utf-7>+AGE-", "+AGE-"),
    ],
)
def test_a_page_is_decoded_as_browsers_do(data: bytes, expected: str, reader: TextReader) -> None:
    assert reader.text(".html", data) == expected


def test_a_page_that_is_not_what_it_declares_is_an_error(reader: TextReader) -> None:
    with pytest.raises(InvalidRequestError, match="not text in utf-8"):
        reader.text(".html", b"<meta charset=utf-8>\xe9")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_plain_text_is_read_in_its_encoding(encoding: str) -> None:
    assert plain_text("A naïve ☃".encode(encoding)) == "A naïve ☃"


@pytest.mark.parametrize(
    "page",
    [
        "<!--" * 20_000, "<a " * 20_000, "<!-- x" * 20_000 + "-->",
        "<![CDATA[" * 10_000, "</" * 40_000, "<a x='" * 20_000,
        "&" * 100_000, "&amp;" * 100_000, "&#x" * 50_000, "<b><i><u><a>" * 5_000, "<b><p>" * 20_000, "<table>" * 20_000,
        "<script>" * 20_000, "<template>" * 20_000, "<svg><title>" * 10_000,
        "<select><option>" * 10_000, "<meta" * 20_000,
        "<a x='" + "y" * 5_000_000 + "'>", "\0" * 100_000, "<?xml" * 20_000,
        "<meta charset=" * 10_000, " " * 500_000 + "x",
    ],
    ids=lambda page: page[:12].strip(),
)  # fmt: skip
def test_pages_that_are_traps_are_read_or_refused(page: str, reader: TextReader) -> None:
    process = reader._process
    with contextlib.suppress(InvalidRequestError):
        reader.text(".html", page.encode())
    assert reader.text(".html", b"<p>after") == "after"
    assert process is None or reader._process is process, "it was read, in the time that a file may take"


def test_a_file_that_takes_too_long_is_given_up_and_the_next_one_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extract, "SECONDS", (1.0, 0.0))
    reader = TextReader()
    assert reader.text(".html", b"<p>before") == "before"
    with pytest.raises(InvalidRequestError, match="takes more than 1 s"):
        reader.text(".html", b"<div>" * 300_000)
    monkeypatch.undo()
    assert reader.text(".html", b"<p>after") == "after"


WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"]), min_size=1, max_size=6)
LINES = st.lists(WORDS, min_size=1, max_size=4)
JUNK = st.sampled_from(
    ["", "<!-- a <p> -->", "<script>if (a < b) '<p>'</script>", "<style>p {}</style>", "<b></b>", "<img alt=x>"]
)
TAGS = st.sampled_from(["p", "div", "h2", "li", "blockquote", "section", "td", "pre", "article"])


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(TAGS, LINES, JUNK, st.booleans()), max_size=6))
def test_any_page_gives_a_line_for_each_block(blocks: list[tuple[str, list[str], str, bool]]) -> None:
    parts, expected = [], []
    for tag, words, junk, closed in blocks:
        inner = " \n\t".join(
            f"<i>{html.escape(word)}</i>" if at % 2 else html.escape(word) for at, word in enumerate(words)
        )
        inner = f"<table><tr><td>{inner}</table>" if tag == "td" else f"<{tag}>{inner}{f'</{tag}>' if closed else ''}"
        parts.append(inner + junk + "<hr>")
        expected.append(" ".join(words))
    assert READER.text(".html", "".join(parts).encode()) == "\n".join(expected)


def test_a_reader_that_dies_costs_its_file_alone(reader: TextReader) -> None:
    assert reader.text(".html", b"<p>before") == "before"
    assert reader._process is not None
    reader._process._process.kill()
    with pytest.raises(InvalidRequestError, match="crashed"):
        reader.text(".html", b"<p>lost")
    assert reader.text(".html", b"<p>after") == "after"


def test_a_reader_leaves_no_process_behind() -> None:
    reader = TextReader()
    reader.text(".html", b"<p>x")
    assert reader._process is not None
    process = reader._process._process
    del reader
    assert process.returncode is not None


def test_a_pdf_that_is_a_trap_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save_pdf(tmp_path / "trap.pdf", ["x"], times=1_000_000)
    monkeypatch.setattr(extract, "SECONDS", (1.0, 0.0))
    (tmp_path / "z.txt").write_text("fine")
    assert documents(tmp_path) == {"trap.pdf": "! the file takes more than 1 s to read", "z.txt": "fine"}


def test_names_that_are_not_utf8_are_rows_of_their_own(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/"
    names = [
        b"\xff.txt",
        b"\xfe.txt",
        b"\\xff.txt",
        b"\xef\xbf\xbd.txt",
        b"\\\\xff.txt",
        b"\xff\\xff.txt",
        "é.txt".encode(),
    ]
    for at, name in enumerate(names):
        with open(raw + name, "w") as file:
            file.write(str(at))
    found = documents(tmp_path)
    assert sorted(found.values()) == [str(at) for at in range(len(names))]
    assert {"./\\xff.txt", "\\xff.txt", "\N{REPLACEMENT CHARACTER}.txt", "é.txt"} < found.keys()
    assert all(label.encode() for label in found)
    assert label_of(Path("a/b.txt")) == "a/b.txt"


def test_links_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "deep").mkdir(parents=True)
    (outside / "below").mkdir(parents=True)
    (root / "deep" / "a.txt").write_text("a")
    (outside / "below" / "b.txt").write_text("b")
    (root / "linked").symlink_to(outside)
    (root / "again").symlink_to(outside / "below")
    (root / "deep" / "up").symlink_to(root)
    (root / "deep" / "further_up").symlink_to(tmp_path)
    (outside / "back").symlink_to(outside)
    (root / "self").symlink_to(root / "self")
    (root / "file.txt").symlink_to(root / "deep" / "a.txt")
    assert documents(root) == {"deep/a.txt": "a", "file.txt": "a", "again/b.txt": "b"}
    for level in range(30):  # 2 ** 30 paths
        folder = tmp_path / f"level{level}"
        folder.mkdir()
        for name in ("x", "y"):
            (folder / name).symlink_to(tmp_path / f"level{level + 1}")
    (tmp_path / "level30").mkdir()
    (tmp_path / "level30" / "end.txt").write_text("end")
    assert list(documents(tmp_path / "level0").values()) == ["end"]
    (tmp_path / "entry").symlink_to(root)
    assert "deep/a.txt" in documents(tmp_path / "entry")


def test_what_is_no_file_is_named_and_never_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    (tmp_path / "device.txt").symlink_to("/dev/zero")
    (tmp_path / "folder.pdf").mkdir()
    (tmp_path / "folder.pdf" / "b.txt").write_text("b")
    (tmp_path / "empty").mkdir()
    (tmp_path / "large.txt").touch()
    os.truncate(tmp_path / "large.txt", extract.LARGEST + 1)
    monkeypatch.chdir(tmp_path)  # names of sockets must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.txt")
        began = time.monotonic()
        found = documents(tmp_path)
    assert time.monotonic() - began < 60
    assert (found.pop("a.txt"), found.pop("folder.pdf/b.txt")) == ("a", "b")
    assert set(found) == {"pipe.txt", "gone.txt", "loop.txt", "device.txt", "large.txt", "socket.txt"}
    assert all(text.startswith("! the file cannot be read") for text in found.values())
    for name in ("pipe.txt", "gone.txt", "loop.txt", "device.txt"):
        with pytest.raises(SourceError, match=r"cannot be read|does not exist"):
            documents(tmp_path / name)
        with pytest.raises(SourceError):
            read_text(tmp_path / name)


def test_a_folder_that_may_not_be_looked_into_is_an_error_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "closed").mkdir()
    iterdir = Path.iterdir

    def refused(folder: Path) -> object:
        if folder.name == "closed":
            raise PermissionError(13, "Permission denied", str(folder))
        return iterdir(folder)

    monkeypatch.setattr(Path, "iterdir", refused)  # root may read everything
    found = documents(tmp_path)
    assert found["a.txt"] == "a"
    assert found["closed"].startswith("! the file cannot be read")


def test_pages_and_pdfs_need_their_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "find_spec", lambda name: None)
    for name, extra in (("a.html", "html"), ("a.HTM", "html"), ("a.pdf", "pdf")):
        (tmp_path / name).write_text("x")
        with pytest.raises(MissingProgramError, match=rf"distkv-dask\[{extra}\]"):
            documents(tmp_path / name)
    (tmp_path / "a.txt").write_text("x")
    assert documents(tmp_path / "a.txt") == {"a.txt": "x"}
