"""KV blocks as Arrow files: a row for each block, its bytes as they lie in the pool and their checksum.

Files are written under another name first and renamed once they are complete. Local ones are mapped into memory to be
read, others are streamed.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack

import numpy as np
import pyarrow as pa

from distkv_dask.errors import SavedDocumentError
from distkv_dask.filesystems import folder_at, is_local
from distkv_dask.protocol import SavedFile
from distkv_dask.worker.pool import Pool

BATCH_BYTES = 64 << 20
"""Bytes of blocks in one record batch, at most (or one block)."""


def write_blocks(pool: Pool, sequence: int, start: int, stop: int, place: str, name: str) -> SavedFile:
    """Save the blocks of tokens ``[start, stop)`` of a sequence, which nobody changes, as file ``name`` of a folder.

    Raises
    ------
    SavedDocumentError
        The file cannot be written; the message says why.
    CapacityError
        Not all of the blocks are here.
    """
    size = pool.bytes.shape[1]
    schema = pa.schema([("block", pa.binary(size)), ("crc32", pa.uint32())])
    checksum = 0
    try:
        filesystem, folder = folder_at(place)
        path = f"{folder}/{name}"
        with filesystem.open_output_stream(f"{path}.unfinished") as stream, pa.ipc.new_file(stream, schema) as file:
            for first, count in _runs(pool.find(sequence, [(start, stop)]), max(1, BATCH_BYTES // size)):
                blocks = pool.bytes[first : first + count]
                sums = np.array([zlib.crc32(block) for block in blocks], np.uint32)
                checksum = zlib.crc32(sums.tobytes(), checksum)
                column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), count, [None, pa.py_buffer(blocks)])
                file.write_batch(pa.record_batch([column, pa.array(sums)], schema))
        filesystem.move(f"{path}.unfinished", path)
        written = filesystem.get_file_info(path).size
    except (OSError, pa.ArrowException) as error:
        raise SavedDocumentError(f"{name} could not be written to {place}: {error}") from error
    return SavedFile(name, start, stop, written, checksum)


def read_blocks(pool: Pool, sequence: int, start: int, stop: int, place: str, file: SavedFile) -> None:
    """Fill the blocks of tokens ``[start, stop)`` of a sequence, as far as a file of a folder holds them (some).

    Raises
    ------
    SavedDocumentError
        The file is not there, truncated or damaged; the message says which and what is wrong.
    """
    into, first = blocks_within(pool, sequence, start, stop, file)
    for block, data in zip(into, read_rows(place, file, pool.bytes.shape[1], first, len(into)), strict=True):
        pool.bytes[block] = data


def blocks_within(pool: Pool, sequence: int, start: int, stop: int, file: SavedFile) -> tuple[list[int], int]:
    """Blocks of the pool for the tokens that are in ``[start, stop)`` and in a file; and their first row there."""
    first, last = max(start, file.start), min(stop, file.stop)
    size = pool.block_tokens
    blocks = pool.find(sequence, [(start, stop)])
    return blocks[(first - start) // size : -(-(last - start) // size)], (first - file.start) // size


def overlapping(start: int, stop: int, files: Iterable[SavedFile]) -> list[SavedFile]:
    """The files that hold some of the tokens ``[start, stop)``: no other needs to be opened."""
    return [file for file in files if file.start < stop and start < file.stop]


def uncovered(start: int, stop: int, files: Iterable[SavedFile]) -> int:
    """The first of the tokens ``[start, stop)`` that is in none of the files; ``stop`` if there is none.

    Examples
    --------
    >>> uncovered(4, 20, [SavedFile("b", 12, 16, 0, 0), SavedFile("a", 0, 12, 0, 0)])
    16
    """
    for file in sorted(files, key=lambda file: file.start):
        if file.start <= start < file.stop:
            start = file.stop
    return min(start, stop)


def read_rows(place: str, file: SavedFile, size: int, first: int, count: int) -> Iterator[np.ndarray]:
    """Blocks ``first`` to ``first + count`` of a file, uint8 [size] each, checked.

    Raises
    ------
    SavedDocumentError
        The file is not there, cannot be read, is truncated or damaged; the message says which and what is wrong.
    """
    try:
        yield from _rows(place, file, size, first, count)
    except (OSError, pa.ArrowException) as error:
        raise SavedDocumentError(f"{file.name} in {place} cannot be read: {error}") from error


def _rows(place: str, file: SavedFile, size: int, first: int, count: int) -> Iterator[np.ndarray]:
    filesystem, folder = folder_at(place)
    path = f"{folder}/{file.name}"
    found = filesystem.get_file_info(path)
    if not found.is_file:
        raise SavedDocumentError(f"{file.name} is not in {place}, or not for this worker: all have to reach the folder")
    if found.size != file.bytes:
        raise SavedDocumentError(f"{file.name} in {place} has {found.size} bytes instead of {file.bytes}: truncated")
    with ExitStack() as stack:
        source = pa.memory_map(path) if is_local(filesystem) else filesystem.open_input_file(path)
        reader = pa.ipc.open_file(stack.enter_context(source))
        if reader.schema.types != [pa.binary(size), pa.uint32()]:
            raise SavedDocumentError(f"{file.name} in {place} holds {reader.schema}, not blocks of {size} bytes")
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        sums = [batch.column(1).to_numpy() for batch in batches]
        checksum = 0
        for some in sums:
            checksum = zlib.crc32(some.tobytes(), checksum)
        if checksum != file.checksum:
            raise SavedDocumentError(f"{file.name} in {place} is damaged: its checksums are not those of the document")
        at = 0
        for batch, expected in zip(batches, sums, strict=True):
            data = np.frombuffer(batch.column(0).buffers()[1], np.uint8)[: len(batch) * size].reshape(-1, size)
            for block, right in zip(data, expected, strict=True):
                if first <= at < first + count:
                    if zlib.crc32(block.data) != right:
                        raise SavedDocumentError(f"{file.name} in {place} is damaged: block {at} has another checksum")
                    yield block
                at += 1
    if at < first + count:
        raise SavedDocumentError(f"{file.name} in {place} holds {at} blocks, fewer than the document says")


def _runs(blocks: list[int], longest: int) -> Iterator[tuple[int, int]]:
    """Consecutive blocks of the pool as first and count.

    Examples
    --------
    >>> list(_runs([4, 5, 6, 2, 3], 2))
    [(4, 2), (6, 1), (2, 2)]
    """
    first, count = blocks[0], 0
    for block in blocks:
        if count and (block != first + count or count == longest):
            yield first, count
            first, count = block, 0
        count += 1
    yield first, count
