"""A ``document.json`` from any source is read as it was written, or refused."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distkv_dask.client.documents.saved_document import FILE, SavedDocument, read_metadata
from distkv_dask.errors import SavedDocumentError
from distkv_dask.messages.names import SavedFile
from distkv_dask.watch import Watch

DOCUMENT = SavedDocument(
    "a report", "a model", "f00d", "float32", 8, 512, "Ünïcode, and \ud83d half of a pair", tuple(range(20)),
    (SavedFile("blocks-00ff-0-8.arrow", 0, 8, 900, 7), SavedFile("blocks-00ff-8-16.arrow", 8, 16, 900, 8)),
)  # fmt: skip


def read(folder: Path) -> SavedDocument:
    return read_metadata(Watch(), str(folder))[1]


def changed(change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The document after a change by someone who knows how to compute its checksum."""
    body = json.loads(DOCUMENT.encoded())
    change(body)
    body.pop("checksum")
    return json.dumps({"checksum": zlib.crc32(json.dumps(body, sort_keys=True).encode()), **body}).encode()


def test_a_document_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(DOCUMENT.encoded())
    assert read(tmp_path) == DOCUMENT
    (tmp_path / FILE).write_bytes(changed(lambda body: None))
    assert read(tmp_path) == DOCUMENT, "the changes below are refused for what they change"


def set_file(at: int, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda body: body["files"][0].__setitem__(at, value)


NAMES = [
    "../x", "/etc/passwd", "blocks-00ff/0-8.arrow", "blocks-00ff\\0-8.arrow", "", ".", "..", "blocks-00\0-0-8.arrow",
    "notes.txt", "blocks-notes.arrow", "document.json", "blocks-00ff-8-16.arrow", "blocks-00ff-0-8.arrow\n",
    "blocks-00ff-\u0660-8.arrow", "../blocks-00ff-0-8.arrow", "http://elsewhere/blocks-00ff-0-8.arrow", None, 5, ["x"],
]  # fmt: skip
HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    **{f"a file called {name!r}": set_file(0, name) for name in NAMES},
    "a worker to be called": lambda body: body["files"][0].append("tcp://10.0.0.1:1234"),
    "no worker, but its field": lambda body: body["files"][0].append(""),
    "a field less": lambda body: body["files"][0].pop(),
    "a file as a mapping": lambda body: body["files"].__setitem__(0, {"name": "blocks-00ff-0-8.arrow"}),
    "another field": lambda body: body.update(worker="tcp://10.0.0.1:1234"),
    "a field that is missing": lambda body: body.pop("dtype"),
    "a place": lambda body: body.update(place="s3://elsewhere"),
    "files that overlap": set_file(2, 16),
    "a file that begins late": set_file(1, 8),
    "half a block": set_file(2, 4),
    "a file that ends before it begins": set_file(2, -8),
    "a size that is none": set_file(3, -1),
    "a size too small for its blocks": set_file(3, 511),
    "a size that is too much": set_file(3, 2**80),
    "a number that is true": set_file(4, True),
    "a number that is 0.0": set_file(1, 0.0),
    "a number that is none": set_file(1, float("nan")),
    "ids beyond what a token is": lambda body: body["ids"].__setitem__(0, 2**40),
    "negative ids": lambda body: body["ids"].__setitem__(0, -1),
    "ids that are texts": lambda body: body.update(ids=["1"] * 20),
    "ids as a mapping": lambda body: body.update(ids={"1": 2}),
    "more ids": lambda body: body.update(ids=[1] * 30),
    "blocks of no tokens": lambda body: body.update(block_tokens=0),
    "blocks of no bytes": lambda body: body.update(block_bytes=0),
    "a name that is a list": lambda body: body.update(name=["x"]),
    "a source that is a number": lambda body: body.update(source=5),
    "a source that is a mapping": lambda body: body.update(source={"path": "/etc/passwd"}),
    "another format": lambda body: body.update(format="pickle"),
    "a version that is a mapping": lambda body: body.update(version={}),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_document_of_somebody_who_knows_the_format_is_refused(what: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(changed(HOSTILE[what]))
    with pytest.raises(SavedDocumentError, match=r"damaged|version"):
        read(tmp_path)


@pytest.mark.parametrize(
    "text",
    [b"", b"null", b"[]", b"{}", b"5", b'"document"', b"\xff", b"[" * 200_000, b'{"a":' * 200_000, b"9" * 5000,
     b'{"checksum": 1, ' + DOCUMENT.encoded()[1:], DOCUMENT.encoded() + b" ", DOCUMENT.encoded().replace(b": ", b":")],
    ids=lambda text: f"{text[:20]!r}",
)  # fmt: skip
def test_what_is_no_document_is_refused(text: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(text)
    with pytest.raises(SavedDocumentError, match="damaged"):
        read(tmp_path)


def test_a_document_of_an_earlier_version_says_so(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(changed(lambda body: body.update(version=1)))
    with pytest.raises(SavedDocumentError, match=r"version 1.*ingest its source again"):
        read(tmp_path)


def test_metadata_larger_than_any_document_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / FILE).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(SavedDocumentError, match=r"bytes, more than"):
        read(tmp_path)


def test_every_bit_flip_and_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = DOCUMENT.encoded()
    assert len(whole) < 1000, "small enough to try all"
    for bit in range(8 * len(whole)):
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        (tmp_path / FILE).write_bytes(broken)
        with pytest.raises(SavedDocumentError):
            read(tmp_path)
    for length in range(len(whole)):
        (tmp_path / FILE).write_bytes(whole[:length])
        with pytest.raises(SavedDocumentError):
            read(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda some: st.lists(some, max_size=4) | st.dictionaries(st.text(max_size=8), some, max_size=4),
    max_leaves=8,
)
FIELDS = [*json.loads(DOCUMENT.encoded())]


@settings(max_examples=300, deadline=None)
@given(field=st.sampled_from(FIELDS), at=st.integers(0, 6), value=JSON)
def test_any_value_in_any_field_is_what_it_should_be_or_refused(
    field: str, at: int, value: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")

    def change(body: dict[str, Any]) -> None:
        if field == "files" and at < 5:
            body["files"][0][at] = value
        else:
            body[field] = value

    (folder / FILE).write_bytes(changed(change))
    try:
        document = read(folder)
    except SavedDocumentError:
        return
    assert all(isinstance(getattr(document, name), str) for name in ("name", "model", "fingerprint", "dtype"))
    assert isinstance(document.source, str | list)
    assert [(file.start, file.stop) for file in document.files] == [(0, 8), (8, 16)]
    assert all(file.name.startswith("blocks-") and "/" not in file.name for file in document.files)
