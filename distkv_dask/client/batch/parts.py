"""The Parquet files of a batch's output, and the list of digests that detects changes to them."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from distkv_dask.client.batch.digest import new_digest
from distkv_dask.errors import OutputError
from distkv_dask.local_folder import sync

UNFINISHED, DIGESTS, LOCK, README = "_unfinished-", "_digests", "_lock", "_README.md"

BEGUN = b"distkv"
"""Key of the batch's parameters in the files' metadata."""

_NAME = re.compile(r"part-(\d{6,})\.parquet")


class Parts:
    """Parquet files ``part-000000.parquet`` and so on in a folder.

    Parameters
    ----------
    folder
        It exists, and no other process writes to it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._list = folder / DIGESTS
        self._digests: dict[str, set[str]] = {}
        for line in self._list.read_bytes().splitlines() if self._list.exists() else ():
            said, _, check = line.rpartition(b" ")
            if check == _check(said):  # others are damaged
                digest, name = said.decode().split(" ", 1)
                self._digests.setdefault(name, set()).add(digest)

    def __iter__(self) -> Iterator[Path]:
        return iter(sorted(path for path in self._folder.glob("part-*.parquet") if _NAME.fullmatch(path.name)))

    def next_number(self) -> int:
        """The first number after all used ones."""
        numbers = [int(found.group(1)) for path in self if (found := _NAME.fullmatch(path.name))]
        return max(numbers, default=-1) + 1

    def path(self, number: int) -> Path:
        """Path of the file of a number."""
        return self._folder / f"part-{number:06}.parquet"

    def write(self, table: pa.Table, part: Path) -> None:
        """Write or replace a file, in an order that survives a crash of the machine."""
        unfinished = part.with_name(UNFINISHED + part.name)
        try:
            pq.write_table(table, unfinished, write_page_checksum=True)
            sync(unfinished)
            self._note(part.name, _digest(unfinished))
            unfinished.replace(part)
            sync(self._folder)
        except BaseException:  # a full disk should not stay full because of it
            unfinished.unlink(missing_ok=True)
            raise

    def is_whole(self, part: Path) -> bool:
        """Whether a file is unchanged; one without a digest counts as unchanged if all of it can be read."""
        if part.name in self._digests:
            return _digest(part) in self._digests[part.name]
        try:
            file = pq.ParquetFile(part, page_checksum_verification=True)
            if BEGUN not in (file.schema_arrow.metadata or {}):
                return False
            for _ in file.iter_batches():
                pass
        except (pa.ArrowException, OSError, ValueError):
            return False
        return True

    def check(self) -> None:
        """Raise :class:`OutputError` if a file is damaged or was changed."""
        for part in self:
            if not self.is_whole(part):
                raise OutputError(
                    f"{part} is damaged, or was changed: bring it back from a copy, or delete it, and the rows that "
                    f"it holds are answered again"
                )

    def _note(self, name: str, digest: str) -> None:
        said = f"{digest} {name}".encode()
        with self._list.open("ab+") as file:
            file.seek(-1 if file.tell() else 0, 2)
            torn = file.read(1) not in (b"", b"\n")
            file.write(b"\n" * torn + said + b" " + _check(said) + b"\n")
            file.flush()
            sync(self._list)
        self._digests.setdefault(name, set()).add(digest)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, new_digest).hexdigest()


def _check(said: bytes) -> bytes:
    return f"{zlib.crc32(said):08x}".encode()
