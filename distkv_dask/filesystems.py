"""Folders anywhere: local paths, and what pyarrow or fsspec has a filesystem for (``s3://``, ``gs://`` and more)."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from distkv_dask.errors import OutputError, SavedDocumentError


def folder_at(place: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a path or URI, and the path in it.

    Raises
    ------
    SavedDocumentError
        Nobody knows its kind.
    """
    if "://" not in place:
        return fs.LocalFileSystem(), str(Path(place).expanduser().absolute())
    try:
        found: tuple[fs.FileSystem, str] = fs.FileSystem.from_uri(place)
        return found
    except (pa.ArrowInvalid, OSError) as error:
        reason: Exception = error
    try:
        from fsspec.core import url_to_fs

        other, path = url_to_fs(place)
        return fs.PyFileSystem(fs.FSSpecHandler(other)), path
    except (ImportError, ValueError) as error:
        reason = error
    raise SavedDocumentError(f"{place} is no place that pyarrow or fsspec can write to: {reason}")


def is_local(filesystem: fs.FileSystem) -> bool:
    """Whether files can be mapped into memory."""
    return isinstance(filesystem, fs.LocalFileSystem)


def write_whole(filesystem: fs.FileSystem, path: str, data: bytes) -> None:
    """Write a file that is there as a whole or not at all: under another name first."""
    unfinished = f"{path}.unfinished"
    with filesystem.open_output_stream(unfinished) as stream:
        stream.write(data)
    filesystem.move(unfinished, path)


def check_file(path: Path) -> None:
    """Raise :class:`OutputError` if a file cannot be written; nothing is left of the attempt, nor of a file changed."""
    there = path.exists()
    try:
        with path.open("ab"):
            pass
        if not there:
            path.unlink()
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be written: {error}") from error
