"""The files of a folder as a batch sees them: links are followed, and what cannot be read is named."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

HIDDEN = "."
"""What names of files and folders begin with that are left out."""


class Folder(NamedTuple):
    """All files below a folder, and the folders that cannot be looked into; both are sorted."""

    root: Path
    files: list[Path]
    unreadable: list[Path]

    def ending_in(self, suffixes: Iterable[str], hidden: tuple[str, ...] = (HIDDEN,)) -> list[Path]:
        """Files whose names end in one of ``suffixes``, and unreadable folders, which may hold some.

        Names that begin as ``hidden`` says, of files or of folders, are left out, but not those of Hive partitions.
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

    Every folder is listed once, however many links lead to it, and under its own path where it has one below ``root``.
    Links to ``root`` or to what it lies in are loops, and are left out. Whatever is no folder counts as a file:
    :func:`open_file` says what is wrong with it.
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
    """Open a regular file for reading; never waits for a pipe's other end.

    Raises
    ------
    OSError
        When it cannot be opened, or is something else.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{str(path)!r} is not a regular file")
    return os.fdopen(descriptor, "rb")


def label_of(path: Path) -> str:
    r"""Return a relative path as text.

    A name that is not UTF-8 is written with ``\xff`` for a byte that is none, ``\\`` for a backslash, and ``./`` before
    it, which no other path begins with: two files never have the same label.

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
