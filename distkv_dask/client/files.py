"""The files of a folder for a batch: links are followed, and unreadable folders are returned, too."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

HIDDEN = "."
"""Prefixes of files and folders that are skipped."""


class Folder(NamedTuple):
    """All files below a folder, and unreadable folders; both are sorted."""

    root: Path
    files: list[Path]
    unreadable: list[Path]

    def ending_in(self, suffixes: Iterable[str], hidden: tuple[str, ...] = (HIDDEN,)) -> list[Path]:
        """Files whose names end in one of ``suffixes``, and unreadable folders, which may hold some.

        Files and folders with a ``hidden`` prefix are skipped, except for Hive partitions.
        """
        ends = tuple(suffixes)
        wanted = [path for path in self.files if path.name.lower().endswith(ends)]
        return [
            path
            for path in sorted(wanted + self.unreadable)
            if not any(part.startswith(hidden) and "=" not in part for part in path.relative_to(self.root).parts)
        ]


def look_into(root: Path) -> Folder:
    """List a folder with everything below it.

    Every folder is listed once, however many links lead to it, and under its own path if that is below ``root``. Links
    to ``root`` or its parents are loops and skipped. Everything that is not a folder counts as a file;
    :func:`open_file` raises if it is not one.
    """
    real = root.resolve()
    identity = _identity(real)
    seen = {identity, *map(_identity, real.parents)}
    found = Folder(root, [], [])
    folders, links = [root], list[Path]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            if folder != root and (identity := _identity(folder)) in seen:
                continue
            seen.add(identity)
            entries = sorted(folder.iterdir())
        except OSError:
            found.unreadable.append(folder)
            continue
        for entry in entries:
            if entry.name.startswith(HIDDEN):
                continue
            if not entry.is_dir():
                found.files.append(entry)
            elif entry.is_symlink():
                links.append(entry)
            else:
                folders.append(entry)
    return Folder(root, sorted(found.files), sorted(found.unreadable))


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading, without ever waiting for the other end of a pipe.

    Raises
    ------
    OSError
        When it cannot be opened, or is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{str(path)!r} is not a regular file")
    return os.fdopen(descriptor, "rb")


def label_of(path: Path) -> str:
    r"""Return a relative path as text.

    A name that is not UTF-8 is written with ``\xff`` for an invalid byte, ``\\`` for a backslash, and the prefix
    ``./``, which no other path has: two files never have the same label.

    Examples
    --------
    >>> label_of(Path("2024/report.txt")), label_of(Path(os.fsdecode(b"caf\xe9.txt")))
    ('2024/report.txt', './caf\\xe9.txt')
    """
    raw = os.fsencode(path.as_posix())
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "./" + raw.replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino
