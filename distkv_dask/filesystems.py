"""Folders anywhere: local paths, and what pyarrow or fsspec has a filesystem for (``s3://``, ``gs://`` and more)."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pyarrow as pa
from pyarrow import fs

from distkv_dask.errors import DistKVError, OutputError, SavedDocumentError, in_words
from distkv_dask.folder import Folder, Source, checked_file_name
from distkv_dask.local_folder import LocalFolder
from distkv_dask.watch import Watch


class RemoteFolder(Folder):
    """A folder of an object store, or of anything else that pyarrow or fsspec reaches."""

    def __init__(self, place: str, filesystem: fs.FileSystem, path: str) -> None:
        self.place = place
        self._filesystem = filesystem
        self._path = path

    def make(self) -> None:
        """Create it and its parents."""
        self._filesystem.create_dir(self._path, recursive=True)

    @contextlib.contextmanager
    def create(self, name: str, durable: bool = True) -> Iterator[Any]:
        """Write a new file; the service determines when it is durable."""
        path = self._file(name)
        try:
            with self._filesystem.open_output_stream(path) as stream:
                yield stream
        except BaseException:
            with contextlib.suppress(Exception):  # the first error counts
                self._filesystem.delete_file(path)
            raise

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Source]:
        """Read a file."""
        found = self._filesystem.get_file_info(self._file(name))
        if not found.is_file:
            raise FileNotFoundError("it does not exist")
        with self._filesystem.open_input_file(self._file(name)) as file:
            yield Source(found.size, file.read_at)

    def names(self) -> list[str]:
        """All files in it."""
        found = self._filesystem.get_file_info(fs.FileSelector(self._path, allow_not_found=True))
        return [one.base_name for one in found if one.is_file]

    def replace(self, name: str, by: str) -> None:
        """Rename file ``by`` to the name of another one, which it replaces."""
        self._filesystem.move(self._file(by), self._file(name))

    def delete(self, name: str) -> None:
        """Delete a file; nothing happens if it does not exist."""
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.delete_file(self._file(name))

    def lock(self, watch: Watch) -> AbstractContextManager[None]:
        """No locks are known."""
        return contextlib.nullcontext()

    def hold(self, name: str) -> AbstractContextManager[None]:
        """No locks are known."""
        return contextlib.nullcontext()

    def is_held(self, name: str) -> None:
        """No locks are known."""

    def _file(self, name: str) -> str:
        return f"{self._path}/{checked_file_name(name)}"


def folder_at(place: str | os.PathLike[str]) -> Folder:
    """The folder of a path or URI.

    Raises
    ------
    SavedDocumentError
        It names no folder, or is of an unknown kind.
    """
    name: Any = os.fspath(place) if isinstance(place, str | os.PathLike) else None
    if not isinstance(name, str):
        raise SavedDocumentError(f"a folder is a path or a URI, not {type(place).__name__}")
    if not name.strip() or "\0" in name:
        raise SavedDocumentError(f"{name!r} names no folder: give a path, or a URI such as s3://bucket/report")
    if not isinstance(place, str) and re.match(r"[a-z][a-z0-9+.-]+:/", name):
        raise SavedDocumentError(f"{name} was a URI before it became a Path, which drops a slash: give the URI as text")
    if "://" not in name:
        try:
            return LocalFolder(Path(name).expanduser().absolute())
        except (RuntimeError, OSError) as error:
            raise SavedDocumentError(f"{name} names no folder: {error}") from error
    try:
        return _known(name, *fs.FileSystem.from_uri(name))
    except (pa.ArrowInvalid, OSError) as error:
        reason: Exception = error
    try:
        from fsspec.core import url_to_fs

        other, path = url_to_fs(name)
        return _known(name, fs.PyFileSystem(fs.FSSpecHandler(other)), path)
    except (ImportError, ValueError) as error:
        reason = error
    raise SavedDocumentError(f"{name} is not a place that pyarrow or fsspec can write to: {in_words(reason)}")


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Raise any error as :class:`SavedDocumentError` that begins with ``what``: drivers raise errors of all kinds."""
    try:
        yield
    except DistKVError:
        raise
    except Exception as error:
        raise SavedDocumentError(f"{what}: {in_words(error)}") from error


def local_path(place: str | os.PathLike[str]) -> Path | None:
    """The path of this machine that a path, or a URI such as ``file:///data``, names; None for URIs of other places.

    Examples
    --------
    >>> local_path("file:///my%20data/t.csv"), local_path("t.csv"), local_path("s3://bucket/t.csv")
    (PosixPath('/my data/t.csv'), PosixPath('t.csv'), None)
    """
    if not isinstance(place, str) or not re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", place):
        return Path(place)
    try:
        uri = urlsplit(place)
    except ValueError:  # brackets that hold no address
        return None
    here = uri.scheme.lower() == "file" and uri.netloc in ("", "localhost")
    return Path(url2pathname(uri.path)) if here else None


def check_file(path: Path) -> None:
    """Raise :class:`OutputError` if a file cannot be written; the attempt leaves nothing behind and changes no file."""
    there = path.exists()
    try:
        with path.open("ab"):
            pass
        if not there:
            path.unlink()
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be written: {error}") from error


def _known(place: str, filesystem: fs.FileSystem, path: str) -> Folder:
    if isinstance(filesystem, fs.LocalFileSystem):
        return LocalFolder(Path(path).absolute())
    return RemoteFolder(place, filesystem, path)
