"""The journal of a batch's output: appended rows are on disk, and are recognized after a crash.

It is an Arrow IPC stream. Each batch of rows is followed by one without rows, with a digest of the preceding bytes in
its metadata. So data that a crash of the machine left half written, empty or as garbage is not taken for rows.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from distkv_dask.client.batch.digest import new_digest
from distkv_dask.local_folder import sync

DIGEST = b"blake2b"


class Journal:
    """A new journal.

    Parameters
    ----------
    path
        Its file; overwritten.
    schema
        Of the rows.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self.rows = 0
        self.began = time.monotonic()
        self._file = _Digested(path.open("wb"))
        try:
            self._writer = pa.ipc.new_stream(self._file, schema)
            self._nothing = pa.RecordBatch.from_pylist([], schema)
            sync(path.parent)
        except BaseException:
            self.abandon()
            raise

    def append(self, batch: pa.RecordBatch) -> None:
        """Add rows; they survive a crash when this returns."""
        self._writer.write_batch(batch)
        self._writer.write_batch(self._nothing, custom_metadata={DIGEST: self._file.digest()})
        self._file.digest()
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows += batch.num_rows

    def close(self) -> None:
        """End it."""
        self._writer.close()
        self._file.close()

    def abandon(self) -> None:
        """Leave the file unchanged, for :func:`recovered`."""
        with contextlib.suppress(OSError):
            self._file.close()


def recovered(path: Path, schema: pa.Schema) -> tuple[list[pa.RecordBatch], bool]:
    """Return all batches that are intact on disk, and whether this is the whole journal.

    Raises
    ------
    OSError
        It cannot be read.
    """
    data = path.read_bytes()
    source, whole, begin = pa.BufferReader(data), [], 0
    rows: pa.RecordBatch | None = None
    sound = True
    try:
        stream = pa.ipc.open_stream(source)
        if not stream.schema.equals(schema):
            return [], False
        while True:
            end = source.tell()
            batch, metadata = stream.read_next_batch_with_custom_metadata()
            if metadata is None or DIGEST not in metadata:
                rows = batch
                continue
            same = metadata[DIGEST] == new_digest(data[begin:end]).hexdigest().encode()
            if same and rows is not None:
                whole.append(rows)
            sound, rows, begin = sound and same, None, source.tell()
    except StopIteration:
        return whole, sound and rows is None and source.tell() == len(data)
    except (pa.ArrowException, OSError, EOFError, ValueError):
        return whole, False


class _Digested:
    """A file with a digest of the bytes written since the digest was last read."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = new_digest()
        self.flush, self.fileno = file.flush, file.fileno

    def write(self, data: Any) -> int:
        self._hash.update(data)
        return self._file.write(data)

    def digest(self) -> bytes:
        found, self._hash = self._hash.hexdigest().encode(), new_digest()
        return found

    def close(self) -> None:
        self._file.close()
