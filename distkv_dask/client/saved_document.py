"""What is saved of a document beside its blocks: which model they are of, its tokens, and how it is asked.

``document.json`` is written last and under another name first, so a folder holds a whole document or none.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
from pyarrow import fs

from distkv_dask.errors import SavedDocumentError
from distkv_dask.filesystems import folder_at, write_whole
from distkv_dask.protocol import SavedFile

FILE = "document.json"
VERSION = 1


@dataclass(frozen=True, slots=True)
class SavedDocument:
    """Metadata of a saved document.

    ``source`` is the text, chat messages or token ids that it was ingested from; ``ids`` are the tokens that all
    prompts on it begin with, of which ``files`` hold the KV.
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

    def check(self, place: str, facts: Mapping[str, Any], block_tokens: int) -> None:
        """Raise :class:`SavedDocumentError` if an engine cannot use it; ``facts`` are the engine's."""
        wanted = {
            "dtype": (self.dtype, facts["dtype"], f"is in {self.dtype}: open the engine with dtype={self.dtype!r}"),
            "model": (self.fingerprint, facts["fingerprint"], f"is of model {self.model!r}, or other weights of it"),
            "blocks": (
                (self.block_tokens, self.block_bytes),
                (block_tokens, facts["block_bytes"]),
                f"has blocks of {self.block_tokens} tokens: open the engine with block_tokens={self.block_tokens}",
            ),
        }
        for what, (mine, its, words) in wanted.items():
            if mine != its:
                raise SavedDocumentError(f"the document in {place} {words}; this engine has another {what}")
        end = 0
        for file in self.files:
            if file.start != end or file.stop <= file.start:
                raise SavedDocumentError(f"the document in {place} is damaged: its files do not follow each other")
            end = file.stop
        if end != len(self.ids) // self.block_tokens * self.block_tokens:
            raise SavedDocumentError(f"the document in {place} is damaged: its files hold {end} of its tokens")


def prepare(place: str) -> str:
    """Make a folder to save in, and return its absolute path or URI."""
    filesystem, folder = folder_at(place)
    try:
        filesystem.create_dir(folder, recursive=True)
    except (OSError, pa.ArrowException) as error:
        raise SavedDocumentError(f"{place} cannot be made: {error}") from error
    return place if "://" in place else folder


def write_metadata(place: str, document: SavedDocument) -> None:
    """Complete a save, and drop what an earlier one left in the folder."""
    filesystem, folder = folder_at(place)
    body = {"format": "distkv-document", "version": VERSION, **asdict(document)}
    text = json.dumps({"checksum": _checksum(body), **body})
    try:
        write_whole(filesystem, f"{folder}/{FILE}", text.encode())
        kept = {file.name for file in document.files}
        for found in filesystem.get_file_info(fs.FileSelector(folder)):
            if found.base_name.startswith("blocks-") and found.base_name not in kept:
                filesystem.delete_file(found.path)
    except (OSError, pa.ArrowException) as error:
        raise SavedDocumentError(f"{FILE} could not be written to {place}: {error}") from error


def read_metadata(place: str) -> SavedDocument:
    """Read what is saved in a folder.

    Raises
    ------
    SavedDocumentError
        There is no document, or its metadata is damaged or of another version.
    """
    filesystem, folder = folder_at(place)
    try:
        with filesystem.open_input_stream(f"{folder}/{FILE}") as stream:
            text = stream.read()
    except (OSError, pa.ArrowException) as error:
        raise SavedDocumentError(f"there is no (whole) document in {place}: {error}") from error
    try:
        body = json.loads(text)
        checksum, kind, version = body.pop("checksum"), body.pop("format"), body.pop("version")
        right = _checksum({"format": kind, "version": version, **body}) == checksum
        if kind == "distkv-document" and version != VERSION:
            raise SavedDocumentError(f"the document in {place} is of version {version}; this distkv reads {VERSION}")
        body["ids"], body["files"] = tuple(body["ids"]), tuple(SavedFile(*file) for file in body["files"])
        document = SavedDocument(**body)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, SavedDocumentError):
            raise
        raise SavedDocumentError(f"{FILE} in {place} is damaged: {error!r:.200}") from error
    if not right:
        raise SavedDocumentError(f"{FILE} in {place} is damaged: its checksum is another one")
    return document


def plain_source(source: Any) -> str | list[Any]:
    """A document's source as JSON keeps it.

    Raises
    ------
    SavedDocumentError
        It cannot be kept.
    """
    plain = source if isinstance(source, str) else list(source) if isinstance(source, Sequence) else source
    try:
        same: Any = json.loads(json.dumps(plain))
    except (TypeError, ValueError) as error:
        raise SavedDocumentError(f"the document's chat messages cannot be saved as JSON: {error}") from error
    return same  # type: ignore[no-any-return]


def _checksum(body: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
