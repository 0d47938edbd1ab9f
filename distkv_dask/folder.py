"""The interface of a folder of files, local or remote.

Names of files come from other people's metadata and from other workers: each is checked before it becomes a path.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from distkv_dask.errors import SavedDocumentError
from distkv_dask.watch import Watch


class Source:
    """An open file of ``size`` bytes; ``at`` reads (count, offset)."""

    def __init__(self, size: int, at: Callable[[int, int], bytes]) -> None:
        self.size = size
        self._at = at

    def read(self, count: int, offset: int) -> bytes:
        """Exactly ``count`` bytes; raises :class:`EOFError` if the file has no such bytes."""
        if offset < 0 or offset + count > self.size or len(data := self._at(count, offset)) != count:
            raise EOFError(f"it ends before byte {offset + count}")
        return data


class Folder(ABC):
    """A folder; names are those of files directly in it.

    Attributes
    ----------
    place
        Absolute path or URI.
    """

    place: str

    @abstractmethod
    def make(self) -> None:
        """Create it and its parents, unless it exists."""

    @abstractmethod
    def create(self, name: str, durable: bool = True) -> AbstractContextManager[Any]:
        """Write a new file, synced to disk if it should be ``durable``; it is deleted if the block raises."""

    @abstractmethod
    def open(self, name: str) -> AbstractContextManager[Source]:
        """Read a file; raises :class:`OSError` if it does not exist or is not a regular file."""

    @abstractmethod
    def names(self) -> list[str]:
        """All files in it."""

    @abstractmethod
    def replace(self, name: str, by: str) -> None:
        """Rename file ``by`` to the name of another one, which it replaces."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete a file; nothing happens if it does not exist."""

    @abstractmethod
    def lock(self, watch: Watch) -> AbstractContextManager[None]:
        """Lock the folder; without support for locks, nothing happens."""

    @abstractmethod
    def hold(self, name: str) -> AbstractContextManager[None]:
        """Lock a file until the block, or this process, ends; without support for locks, nothing happens."""

    @abstractmethod
    def is_held(self, name: str) -> bool | None:
        """Whether a process has locked a file; None without support for locks."""


def checked_file_name(name: str) -> str:
    """The name of a file, if it names one in the folder itself.

    Raises
    ------
    SavedDocumentError
        It may lead elsewhere.

    Examples
    --------
    >>> checked_file_name("../x")
    Traceback (most recent call last):
    ...
    distkv_dask.errors.SavedDocumentError: '../x' is not the name of a file in a folder
    """
    if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\0]", name):
        raise SavedDocumentError(f"{name!r:.200} is not the name of a file in a folder")
    return name
