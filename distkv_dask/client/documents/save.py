"""One save of a document in a folder: complete or not at all, whatever else happens in that folder.

Every save has a random tag in the names of all its files, so two saves never share a file. The last save to rename its
draft to ``document.json`` wins, and deletes the files of the previous one. Otherwise a save deletes only files with its
own tag, and those of saves whose marker is not locked, because their process died.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time

from distkv_dask.client.documents.saved_document import FILE, SavedDocument, document_in
from distkv_dask.errors import SavedDocumentError
from distkv_dask.filesystems import explained, folder_at
from distkv_dask.folder import Folder
from distkv_dask.watch import Watch

HELD_SECONDS = 86_400.0
"""Without locks, a save counts as running for this time; the marker has its start."""

MARKER = re.compile(re.escape(FILE) + r"\.([0-9a-f]{16})\.saving")


class Save:
    """One save; its methods block, and may hang with the folder.

    Parameters
    ----------
    watch, place
        A path or URI; the folder is made if it does not exist.

    Attributes
    ----------
    place
        The same, absolute.
    tag
        Part of the names of its files.

    Raises
    ------
    SavedDocumentError
        It is not a folder, or cannot be written to.
    """

    def __init__(self, watch: Watch, place: str | os.PathLike[str]) -> None:
        self._folder: Folder = folder_at(place)
        self.place = self._folder.place
        self.tag = secrets.token_hex(8)
        self._held = contextlib.ExitStack()
        self._stage = "begun"
        with explained(f"{self.place} cannot be created or written to"):
            self._folder.make()
            with self._folder.lock(watch):
                for name in self._folder.names():
                    watch.step()
                    if (found := MARKER.fullmatch(name)) and self._is_over(name):
                        self._clear(watch, found[1])
                with self._folder.create(f"{FILE}.{self.tag}.saving") as stream:
                    stream.write(str(int(time.time())).encode())
                    watch.step()
                self._held.enter_context(self._folder.hold(f"{FILE}.{self.tag}.saving"))

    def commit(self, watch: Watch, document: SavedDocument) -> None:
        """All blocks are written: make this the folder's document, and delete the files of the one before it.

        Raises
        ------
        SavedDocumentError
            It cannot be written there. An earlier document is kept.
        """
        draft = f"{FILE}.{self.tag}.unfinished"
        with explained(f"{FILE} could not be written to {self.place}"):
            with self._folder.create(draft) as stream:
                stream.write(document.encoded())
                watch.step()
            with self._folder.lock(watch):
                before: set[str] = set()
                with contextlib.suppress(SavedDocumentError):  # there was none, or it cannot be read
                    before = {file.name for file in document_in(self._folder).files}
                if f"{FILE}.{self.tag}.saving" not in self._folder.names():
                    raise SavedDocumentError("somebody deleted this save because it took too long: save again")
                with watch.change():
                    self._stage = "committing"
                self._folder.replace(FILE, by=draft)
                self._stage = "committed"
                for name in before - {file.name for file in document.files}:
                    watch.step()
                    self._folder.delete(name)

    def end(self, watch: Watch) -> None:
        """Delete temporary files of this save, or all of its files if it did not finish.

        Raises
        ------
        SavedDocumentError
            Something cannot be deleted. The next save in this folder tries again.
        """
        with self._held, explained(f"what is left of the save in {self.place} could not be deleted"):
            if self._stage != "committing":  # otherwise it may still become the folder's document
                self._clear(watch, self.tag)

    def _is_over(self, marker: str) -> bool:
        """Whether the process that made a save has ended."""
        held = self._folder.is_held(marker)
        if held is None:
            began = b""
            with contextlib.suppress(FileNotFoundError, EOFError), self._folder.open(marker) as source:
                began = source.read(min(source.size, 20), 0)
            held = not began.isdigit() or time.time() - int(began) < HELD_SECONDS
        return not held

    def _clear(self, watch: Watch, tag: str) -> None:
        """Delete files of a save that do not belong to the folder's document; its marker last."""
        names, kept = self._folder.names(), set[str]()
        if FILE in names:
            kept = {file.name for file in document_in(self._folder).files}
        ours = re.compile(
            rf"(?:blocks|state|window)-{tag}[0-9]?-[0-9]+-[0-9]+\.arrow|{re.escape(FILE)}\.{tag}\.unfinished"
        )
        for name in names:
            watch.step()
            if ours.fullmatch(name) and name not in kept:
                self._folder.delete(name)
        self._folder.delete(f"{FILE}.{tag}.saving")


def try_place(watch: Watch, place: str | os.PathLike[str]) -> None:
    """Raise :class:`SavedDocumentError` if nothing can be saved in a folder, which is created if needed."""
    Save(watch, place).end(watch)
