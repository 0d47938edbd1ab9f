"""Folders of this machine, network disks included.

New folders and files are readable only by their owner, whatever the umask, and survive a crash of the machine once they
exist. A file that could not be written completely is deleted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from distkv_dask.folder import Folder, Source, checked_file_name
from distkv_dask.watch import Watch

LOCK_POLL = 0.05
"""Seconds between two attempts to lock a folder."""


class LocalFolder(Folder):
    """A folder of this machine, or one that looks local (NFS)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.place = str(path)

    def make(self) -> None:
        """Create it and its parents, for its owner only."""
        missing = [one for one in (self.path, *self.path.parents) if not one.exists()]
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another process has just created it
                folder.mkdir(0o700)
                folder.chmod(0o700)  # whatever the umask
                sync(folder.parent)
        if not self.path.is_dir():
            raise NotADirectoryError(f"{self.path} is not a folder")

    @contextlib.contextmanager
    def create(self, name: str, durable: bool = True) -> Iterator[IO[bytes]]:
        """Write a new file for its owner only."""
        path = self._file(name)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                with contextlib.suppress(PermissionError):  # the file system has no modes
                    os.fchmod(descriptor, 0o600)
                yield file
                file.flush()
                if durable:
                    os.fsync(descriptor)
            if durable:
                sync(self.path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Source]:
        """Read a file without mapping it into memory: truncating it at the same time must not end this process."""
        descriptor = os.open(self._file(name), os.O_RDONLY | os.O_NONBLOCK)  # does not wait for a pipe
        try:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise OSError("it is no plain file")
            yield Source(facts.st_size, lambda count, offset: os.pread(descriptor, count, offset))
        finally:
            os.close(descriptor)

    def names(self) -> list[str]:
        """All files in it."""
        with os.scandir(self.path) as entries:
            return [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]

    def replace(self, name: str, by: str) -> None:
        """Rename file ``by`` to the name of another one; durable when this returns."""
        self._file(by).replace(self._file(name))
        sync(self.path)

    def delete(self, name: str) -> None:
        """Delete a file; nothing happens if it does not exist."""
        self._file(name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self, watch: Watch) -> Iterator[None]:
        """Lock the folder, once other processes have released it."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            while _flock(descriptor) is False:
                watch.check()
                time.sleep(LOCK_POLL)
            yield
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Lock a file until the block, or this process, ends."""
        descriptor = os.open(self._file(name), os.O_RDWR)
        try:
            _flock(descriptor)
            yield
        finally:
            os.close(descriptor)

    def is_held(self, name: str) -> bool | None:
        """Whether a process has locked a file; None without support for locks."""
        try:
            descriptor = os.open(self._file(name), os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError:  # deleted, or another user's
            return True
        try:
            free = _flock(descriptor)
            return None if free is None else not free
        finally:
            os.close(descriptor)

    def _file(self, name: str) -> Path:
        return self.path / checked_file_name(name)


def _flock(descriptor: int) -> bool | None:
    """Lock an open file: False if another process has, None without support for locks (some network disks)."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def sync(path: Path) -> None:
    """Sync a file, or the names in a folder, to disk; nothing happens if a file system does not sync folders."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
    finally:
        os.close(descriptor)
