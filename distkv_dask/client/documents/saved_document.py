"""Metadata of a saved document: its model, its tokens, and how questions are asked.

A saved document is untrusted. Every field has a type and a range, there are no other fields, and they name only files
in the document's folder.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from distkv_dask.adapter import Adapter, adapter_key
from distkv_dask.errors import SavedDocumentError, in_words
from distkv_dask.filesystems import explained, folder_at
from distkv_dask.folder import Folder
from distkv_dask.messages.client_calls import EngineFacts
from distkv_dask.messages.names import SavedFile
from distkv_dask.watch import Watch

FILE = "document.json"
VERSION = 2
MOST_BYTES = 256 << 20
"""Maximum size of ``document.json`` in bytes: 10 million tokens and their text need less."""

FILE_NAME = re.compile(r"(blocks|state|window)-[0-9a-f]+-[0-9]+-[0-9]+\.arrow")
TOP = 2**63


@dataclass(frozen=True, slots=True)
class SavedDocument:
    """Metadata of a saved document.

    ``source`` is the ingested text, chat messages or token ids; ``ids`` is the common prefix of all prompts on it, and
    ``files`` have the KV of these tokens. If it was computed with an adapter, it has the path and fingerprint of that.
    """

    name: str
    model: str
    fingerprint: str
    dtype: str
    block_tokens: int
    block_bytes: int
    source: Any
    ids: tuple[int, ...]
    files: tuple[SavedFile, ...]
    adapter_path: str = ""
    adapter: str = ""

    def check(self, place: str, facts: EngineFacts, block_tokens: int) -> None:
        """Raise :class:`SavedDocumentError` if an engine with these ``facts`` cannot use it."""
        wanted = {
            "dtype": (self.dtype, facts.dtype, f"is in {self.dtype}: open the engine with dtype={self.dtype!r}"),
            "model": (self.fingerprint, facts.fingerprint, f"is of model {self.model!r}, or other weights of it"),
            "blocks": (
                (self.block_tokens, self.block_bytes),
                (block_tokens, facts.block_bytes),
                f"has blocks of {self.block_tokens} tokens: open the engine with block_tokens={self.block_tokens}",
            ),
        }
        for what, (mine, its, words) in wanted.items():
            if mine != its:
                raise SavedDocumentError(f"the document in {place} {words}; this engine has another {what}")
        window = facts.max_positions
        if len(self.ids) >= window:
            raise SavedDocumentError(
                f"the document in {place} has {len(self.ids)} tokens, which leave no room for a question in the "
                f"model's window of {window} tokens"
            )

    def check_adapter(self, place: str, adapter: Adapter | None) -> None:
        """Raise :class:`SavedDocumentError` if it was not computed with this adapter."""
        if self.adapter == adapter_key(adapter):
            return
        if not self.adapter:
            raise SavedDocumentError(f"the document in {place} was computed without an adapter: load it without one")
        raise SavedDocumentError(
            f"the document in {place} was computed with the adapter in {self.adapter_path} as it was then; the one in "
            f"{self.adapter_path if adapter is None else adapter.path} has other weights: give the folder with those "
            "(adapter=...), or ingest its source again"
        )

    def encoded(self) -> bytes:
        """The content of ``document.json``.

        Raises
        ------
        SavedDocumentError
            It would be too large to be read.
        """
        body = {"format": "distkv-document", "version": VERSION, **asdict(self)}
        if not self.adapter:  # versions without adapters can read documents without one
            del body["adapter"], body["adapter_path"]
        text = json.dumps({"checksum": _checksum(body), **body}).encode()
        if len(text) > MOST_BYTES:
            raise SavedDocumentError(f"{FILE} would have {len(text)} bytes, more than {MOST_BYTES}: save parts of it")
        return text


def read_metadata(watch: Watch, place: str | os.PathLike[str]) -> tuple[str, SavedDocument]:
    """Read what is saved in a folder; returns its absolute path or URI, too.

    Raises
    ------
    SavedDocumentError
        There is no document, or its metadata is damaged or of another version.
    """
    folder = folder_at(place)
    return folder.place, document_in(folder)


def document_in(folder: Folder) -> SavedDocument:
    """The document in a folder; raises as :func:`read_metadata` does."""
    with explained(f"there is no (complete) document in {folder.place}"), folder.open(FILE) as source:
        if source.size > MOST_BYTES:
            raise SavedDocumentError(f"{FILE} in {folder.place} has {source.size} bytes, more than {MOST_BYTES}")
        text = source.read(source.size, 0)
    try:
        body = json.loads(text)
        canonical = json.dumps(body).encode() == text  # the text must be exactly what we would write
        checksum, kind, version = body.pop("checksum"), body.pop("format"), body.pop("version")
        right = canonical and _checksum({"format": kind, "version": version, **body}) == checksum
        if kind == "distkv-document" and version != VERSION:
            raise SavedDocumentError(
                f"the document in {folder.place} is of version {version!r:.20}; this distkv reads {VERSION}: ingest "
                "its source again"
            )
        if not right or kind != "distkv-document":
            raise ValueError("its checksum does not match")
        return _checked(body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, SavedDocumentError):
            raise
        raise SavedDocumentError(f"{FILE} in {folder.place} is damaged: {in_words(error):.300}") from error


def plain_source(source: Any) -> str | list[Any]:
    """A document's source as JSON.

    Raises
    ------
    SavedDocumentError
        It cannot be written as JSON.
    """
    plain = source if isinstance(source, str) else list(source) if isinstance(source, Sequence) else source
    try:
        same: Any = json.loads(json.dumps(plain))
    except (TypeError, ValueError) as error:
        raise SavedDocumentError(f"the document's chat messages cannot be saved as JSON: {error}") from error
    return same  # type: ignore[no-any-return]


def _checked(body: dict[str, Any]) -> SavedDocument:
    """A document from the fields of a file; raises ValueError if they are invalid."""
    names = [field.name for field in fields(SavedDocument)]
    if "adapter" not in body:
        body |= {"adapter": "", "adapter_path": ""}
    _require(sorted(body) == sorted(names), f"it has the fields {sorted(body)}")
    for name in ("name", "model", "fingerprint", "dtype", "adapter", "adapter_path"):
        _require(isinstance(body[name], str), f"{name} is no text")
    for name in ("block_tokens", "block_bytes"):
        _require(_is_number(body[name], 1, TOP), f"{name} is not a number above 0")
    _require(isinstance(body["source"], str | list), "its source is neither a text nor a list")
    ids, files = body["ids"], body["files"]
    _require(isinstance(ids, list) and all(_is_number(one, 0, 2**31) for one in ids), "its ids are not token ids")
    _require(isinstance(files, list), "its files are no list")
    body["ids"], body["files"] = tuple(ids), tuple(_checked_file(file) for file in files)
    document = SavedDocument(**body)
    _check_files(document)
    return document


def _checked_file(file: Any) -> SavedFile:
    kept = len(SavedFile._fields)
    _require(isinstance(file, list) and len(file) == kept, f"the entry of a file does not have {kept} fields")
    name, *numbers = file
    _require(isinstance(name, str) and FILE_NAME.fullmatch(name) is not None, f"a file is called {name!r:.100}")
    _require(all(_is_number(one, 0, TOP) for one in numbers), f"an entry of {name} is not a number")
    return SavedFile(name, *numbers)


def _check_files(document: SavedDocument) -> None:
    """Check that the files cover all tokens once, in whole blocks; files with states of homes belong to the end."""
    size, end = document.block_tokens, 0
    kept = len(document.ids) // size * size
    for file in document.files:
        if not file.name.startswith("blocks"):
            _require(file.start < file.stop == kept, f"{file.name} is not of the document's end")
            continue
        rows = (file.stop - file.start) // size
        _require(file.start == end and rows > 0 and file.stop % size == 0, "its files do not follow each other")
        _require(file.bytes >= rows * document.block_bytes, f"{file.name} is too small for its blocks")
        end = file.stop
    _require(end == kept, f"its files hold {end} of its tokens")
    _require(len({file.name for file in document.files}) == len(document.files), "a file is named twice")


def _is_number(value: Any, least: int, top: int) -> bool:
    return type(value) is int and least <= value < top


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _checksum(body: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
