"""Files and batches of one key; calls with another key cannot find out that they exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

from starlette.requests import Request

from distkv_dask.client.serve.batch_queue import BatchQueue
from distkv_dask.client.serve.failures import Refusal
from distkv_dask.client.serve.keys import OWNER
from distkv_dask.client.serve.store import Store


class Shelf:
    """Files and batches of one owner; records are shown without their owner.

    Parameters
    ----------
    store
        Has those of all owners.
    owner
        See :meth:`distkv_dask.client.serve.keys.Keys.owner`.
    """

    def __init__(self, store: Store, owner: str) -> None:
        self._store = store
        self._owner = owner

    def read(self, name: str) -> dict[str, Any]:
        """The record of an id; raises :class:`Refusal` if there is none, or if it is another owner's."""
        record = self._store.read(name)
        if record.get(OWNER) != self._owner:
            raise Refusal(f"there is no {name}", 404, "not_found")
        return shown(record)

    def records(self, kind: str) -> list[dict[str, Any]]:
        """All records of a kind, the newest first."""
        return [shown(one) for one in self._store.records(kind) if one.get(OWNER) == self._owner]

    def path(self, name: str) -> Path:
        """Path of a file; raises as :meth:`read` does."""
        self.read(name)
        return self._store.path(name)

    def add_file(self, source: BinaryIO, name: str, purpose: str) -> dict[str, Any]:
        """Keep a file."""
        return shown(self._store.add_file(source, name, purpose, self._owner))

    def owned(self, record: dict[str, Any]) -> dict[str, Any]:
        """A new record with its owner."""
        return record | {OWNER: self._owner}

    def remove(self, name: str) -> None:
        """Delete a file; raises as :meth:`read` does."""
        self.read(name)
        self._store.remove(name)


def shown(record: dict[str, Any]) -> dict[str, Any]:
    """A record as its owner sees it."""
    return {name: value for name, value in record.items() if name != OWNER}


def shelf_of(request: Request) -> Shelf:
    """The shelf of the key that a call has."""
    batches: BatchQueue = request.app.state.batches
    return Shelf(batches.store, request.state.owner)
