"""Files that clients upload and that batches write, each with a record, in a folder of the server."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from distkv_dask.client.serve.failures import Refusal
from distkv_dask.client.serve.keys import OWNER
from distkv_dask.local_folder import LocalFolder, sync

_ID = re.compile(r"(?:file|batch)-[0-9a-f]{24}")


class Store:
    """Records in JSON by their ids, some of them with a file.

    Only the user who runs the server can read them, and they survive a crash.

    Parameters
    ----------
    folder
        Created if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        LocalFolder(folder).make()
        for left in folder.glob("*.unfinished"):
            left.unlink()

    def path(self, name: str) -> Path:
        """Path of the file of an id; raises :class:`Refusal` if it is not an id."""
        if not _ID.fullmatch(name):
            raise Refusal(f"{name!r:.100} is not the id of a file or batch", 404, "not_found")
        return self.folder / name

    def read(self, name: str) -> dict[str, Any]:
        """The record of an id; raises :class:`Refusal` if there is none."""
        try:
            found: dict[str, Any] = json.loads(self._record(name).read_bytes())
        except FileNotFoundError:
            raise Refusal(f"there is no {name}", 404, "not_found") from None
        return found

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a record; raises :class:`Refusal` if the disk does not take it, and leaves the old one then."""
        path = self._record(record["id"])
        unfinished = path.with_suffix(".unfinished")
        with _writing(unfinished, record["id"]):
            with private(unfinished) as file:
                file.write(json.dumps(record).encode())
            sync(unfinished)
            unfinished.replace(path)
            sync(self.folder)

    def records(self, kind: str) -> list[dict[str, Any]]:
        """All records of a kind (``"file"`` or ``"batch"``), the newest first."""
        found = [json.loads(path.read_bytes()) for path in self.folder.glob(f"{kind}-*.json")]
        return sorted(found, key=lambda one: (one["created_at"], one["id"]), reverse=True)

    def add_file(self, source: BinaryIO, name: str, purpose: str, owner: str) -> dict[str, Any]:
        """Write a file of ``owner``, with a record."""
        record = {
            "id": f"file-{secrets.token_hex(12)}", "object": "file", "bytes": 0, "created_at": int(time.time()),
            "filename": name, "purpose": purpose, "status": "processed", OWNER: owner,
        }  # fmt: skip
        path = self.path(str(record["id"]))
        with _writing(path, "the file"):
            with private(path) as file:
                shutil.copyfileobj(source, file, 1 << 20)
            sync(path)
            record["bytes"] = path.stat().st_size
            self.write(record)
        return record

    def remove(self, name: str) -> None:
        """Delete a file."""
        self.read(name)
        self._record(name).unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self.path(name).unlink()

    def _record(self, name: str) -> Path:
        return self.path(name).with_suffix(".json")


@contextlib.contextmanager
def _writing(path: Path, what: str) -> Iterator[None]:
    """Delete a file that cannot be written; raises :class:`Refusal` if the disk does not take it."""
    try:
        yield
    except (OSError, Refusal) as error:
        path.unlink(missing_ok=True)
        if isinstance(error, Refusal):
            raise
        raise Refusal(f"{what} cannot be kept: {error.strerror or error}", 507) from error


def private(path: Path) -> BinaryIO:
    """Open a new file that only its owner can read and write."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w+b")
