"""Files in the user's cache folder that one process of a machine writes, and all of them map.

A process holds a file's lock while it looks for the file and writes it, so the others wait, and find it. All files are
in one folder: if there is no room for a new one, those that were used longest ago are deleted.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from distkv_dask.cache_folder import cache_folder

FREE = 0.1
"""Part of a disk that stays free: older files are deleted, and if that is not enough, nothing is written."""

_SUFFIX = ".safetensors"


def host_file(form: object, key: object) -> Path:
    """Path of a file, which may not exist.

    Parameters
    ----------
    form
        What kind of file it is, and the version of that.
    key
        Everything that its content depends on, besides transformers. The ``repr`` of both is the same in all processes.
    """
    from transformers import __version__

    text = repr((form, __version__, key))
    return cache_folder("weights") / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}{_SUFFIX}"


@contextmanager
def locked(file: Path, wait: float) -> Iterator[None]:
    """Hold a file's lock, in a folder that exists; raises OSError, or Timeout after ``wait`` seconds."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock_of(file), timeout=wait):
        yield


def lock_of(file: Path) -> str:
    """Path of a file's lock."""
    return f"{file}.lock"


def is_there(file: Path) -> bool:
    """While holding the lock: whether the file exists; if so, it counts as used now."""
    with suppress(FileNotFoundError):
        os.utime(file)
        return True
    return False


def make_room(folder: Path, need: int, kept: Collection[Path] = ()) -> str:
    """Delete the files used longest ago until there is room for one of ``need`` bytes; processes that map one keep it.

    Parameters
    ----------
    folder, need
        Where the new file goes, and its size.
    kept
        Files that are not deleted.

    Returns
    -------
    str
        Why there is no room; empty if there is.
    """
    files = sorted({*folder.glob(f"*{_SUFFIX}")} - {*kept}, key=lambda one: one.stat().st_mtime)
    while (disk := shutil.disk_usage(folder)).free - need < FREE * disk.total:
        if not files:
            return (
                f"a file of {need} bytes for all processes does not fit the disk of {folder}: {disk.free} of "
                f"{disk.total} bytes are free, and a tenth stays free. Make room there, or set XDG_CACHE_HOME to a "
                "folder on another disk"
            )
        victim = files.pop(0)
        with suppress(Timeout, FileNotFoundError), FileLock(lock_of(victim), timeout=0):
            victim.unlink()
    return ""


def put(file: Path, write: Callable[[Path], None]) -> None:
    """While holding the lock: let ``write`` fill a file, which appears only when all of it is on disk.

    Raises
    ------
    OSError
        It cannot be written; nothing of it is left.
    """
    scratch = file.with_suffix(".new")
    try:
        write(scratch)
        with scratch.open("rb") as written:
            os.fsync(written.fileno())  # otherwise a power failure could leave a file of zeros
        os.replace(scratch, file)
    finally:
        with suppress(FileNotFoundError):
            scratch.unlink()
