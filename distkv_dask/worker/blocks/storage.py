"""KV blocks as Arrow files: a row for each block, with its bytes as in the pool and their checksum.

The number of blocks, their size and the rows per batch are known before a file is opened, and only these determine how
it is read. The file's own metadata (rows, sizes, compression) is for other readers of Arrow files. Nothing is
allocated, unpacked or read by it, so a hostile or damaged file causes a checksum error at worst.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from distkv_dask.errors import SavedDocumentError
from distkv_dask.filesystems import explained
from distkv_dask.folder import Folder, Source
from distkv_dask.messages.names import SavedFile, SpilledFile
from distkv_dask.watch import Watch
from distkv_dask.worker.blocks.pool import Pool

BATCH_BYTES = 64 << 20
"""Bytes of blocks in one record batch (or one block); only the last batch is smaller. Part of the format."""

PIECE_BYTES = 4 << 20
"""Maximum bytes of blocks read at once (or one block)."""

MAGIC = b"ARROW1\0\0"
MESSAGE = struct.Struct("<Ii")
"""Start of a message: a mark, and the bytes of its metadata. One without metadata ends the stream."""

CONTINUES = 0xFFFFFFFF
METADATA_BYTES = 1 << 20


def write_blocks(
    pool: Pool, sequence: int, start: int, stop: int, folder: Folder, name: str, watch: Watch, durable: bool
) -> SavedFile:
    """Save the blocks of tokens ``[start, stop)`` of an idle sequence as a new file of a folder.

    Raises
    ------
    SavedDocumentError
        The file cannot be written; the message says why, and nothing of it is left.
    CapacityError
        Not all of the blocks are here.
    """
    blocks, rows = pool.find(sequence, [(start, stop)]), batch_rows(pool.block_bytes)
    batches = (pool.read(blocks[at : at + rows]) for at in range(0, len(blocks), rows))
    written, checksum = write_batches(batches, pool.block_bytes, folder, name, watch, durable)
    return SavedFile(name, start, stop, written, checksum)


def write_files(
    pool: Pool, sequence: int, ranges: Iterable[tuple[int, int]], folder: Folder, tag: str, watch: Watch,
    durable: bool = False,
) -> Iterator[SavedFile]:  # fmt: skip
    """Save token ranges of a sequence, one file per iteration (:func:`all_or_none`)."""
    for start, stop in ranges:
        yield write_blocks(pool, sequence, start, stop, folder, file_name(tag, start, stop), watch, durable)


def all_or_none(files: Iterable[SavedFile], delete: Callable[[str], None]) -> tuple[SavedFile, ...]:
    """Write files one per iteration; if one fails, the earlier ones are deleted."""
    written = list[SavedFile]()
    try:
        written.extend(files)  # files before the one that failed are in it
    except BaseException:
        for file in written:
            delete(file.name)
        raise
    return tuple(written)


BLOCKS = "blocks"


def file_name(tag: str, start: int, stop: int, what: str = BLOCKS) -> str:
    """Name of the file of tokens ``[start, stop)``."""
    return f"{what}-{tag}-{start}-{stop}.arrow"


def write_batches(
    batches: Iterable[np.ndarray], size: int, folder: Folder, name: str, watch: Watch, durable: bool
) -> tuple[int, int]:
    """Write blocks, uint8 [n, size] each of :func:`batch_rows` but the last, as a new file; its bytes and checksum.

    Raises
    ------
    SavedDocumentError
        The file cannot be written; the message says why, and nothing of it is left.
    """
    schema = pa.schema([("block", pa.binary(size)), ("crc32", pa.uint32())])
    checksum = 0
    with explained(f"{name} could not be written to {folder.place}"), folder.create(name, durable) as stream:
        with pa.ipc.new_file(stream, schema) as file:
            for data in batches:
                watch.step()
                sums = np.array([zlib.crc32(block) for block in data], np.uint32)
                checksum = zlib.crc32(sums.tobytes(), checksum)
                column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), len(data), [None, pa.py_buffer(data)])
                file.write_batch(pa.record_batch([column, pa.array(sums)], schema))
        written = stream.tell()
        watch.step()
    return written, checksum


def read_blocks(
    pool: Pool, sequence: int, start: int, stop: int, folder: Folder, file: SavedFile | SpilledFile, watch: Watch
) -> None:
    """Fill the blocks of tokens ``[start, stop)`` of a sequence that are in a file of a folder (at least some).

    Raises
    ------
    SavedDocumentError
        The file is not there, truncated or damaged; the message says which and what is wrong.
    """
    into, first = blocks_within(pool, sequence, start, stop, file)
    rows = read_rows(folder, file, pool.block_bytes, pool.block_tokens, first, len(into), watch)
    for block, data in zip(into, rows, strict=True):
        with watch.change():  # an abandoned read must not change a block that has a new owner
            pool.fill(block, data)


def blocks_within(
    pool: Pool, sequence: int, start: int, stop: int, file: SavedFile | SpilledFile
) -> tuple[list[int], int]:
    """Blocks of the pool for the tokens that are in ``[start, stop)`` and in a file; and their first row there."""
    first, last = max(start, file.start), min(stop, file.stop)
    size = pool.block_tokens
    blocks = pool.find(sequence, [(start, stop)])
    return blocks[(first - start) // size : -(-(last - start) // size)], (first - file.start) // size


def overlapping(start: int, stop: int, files: Iterable[Any]) -> list[Any]:
    """The files that have some of the tokens ``[start, stop)``."""
    return [file for file in files if file.start < stop and start < file.stop]


def uncovered(start: int, stop: int, files: Iterable[SavedFile | SpilledFile]) -> int:
    """The first of the tokens ``[start, stop)`` that is in none of the files; ``stop`` if all are.

    Examples
    --------
    >>> uncovered(4, 20, [SavedFile("b", 12, 16, 0, 0), SavedFile("a", 0, 12, 0, 0)])
    16
    """
    for file in sorted(files, key=lambda file: file.start):
        if file.start <= start < file.stop:
            start = file.stop
    return min(start, stop)


def read_rows(
    folder: Folder, file: SavedFile | SpilledFile, size: int, block_tokens: int, first: int, count: int, watch: Watch
) -> Iterator[np.ndarray]:
    """Blocks ``first`` to ``first + count`` of a file, uint8 [size] each, checked.

    Raises
    ------
    SavedDocumentError
        The file is not there, cannot be read, is truncated or damaged; the message says which and what is wrong.
    """
    rows = -(-(file.stop - file.start) // block_tokens)
    with explained(f"{file.name} in {folder.place} cannot be read"):
        try:
            with folder.open(file.name) as source:
                bodies = _checked_bodies(source, file, rows, size, watch)
                if first + count > rows:
                    raise _Damaged(f"it holds {rows} blocks, but blocks {first} to {first + count} are needed")
                for at, block, right in _blocks(source, bodies, size, first, count, watch):
                    if zlib.crc32(block.data) != right:
                        raise _Damaged(f"the checksum of block {at} does not match")
                    yield block
        except FileNotFoundError as error:
            raise SavedDocumentError(
                f"{file.name} is not in {folder.place}, or this worker cannot see it: all workers must reach the folder"
            ) from error
        except (EOFError, _Damaged) as error:
            raise SavedDocumentError(f"{file.name} in {folder.place} is damaged: {error}") from error


class _Damaged(Exception):
    """A file is damaged."""


def _checked_bodies(
    source: Source, file: SavedFile | SpilledFile, rows: int, size: int, watch: Watch
) -> list[tuple[int, np.ndarray]]:
    """As :func:`_bodies`, after checking the checksums against the document's."""
    if source.size != file.bytes:
        raise _Damaged(f"{source.size} bytes instead of {file.bytes}, so truncated or another file")
    bodies, checksum = list(_bodies(source, rows, size, watch)), 0
    for _, sums in bodies:
        checksum = zlib.crc32(sums.tobytes(), checksum)
    if checksum != file.checksum:
        raise _Damaged("its checksums are not those of the document")
    return bodies


def _bodies(source: Source, rows: int, size: int, watch: Watch) -> Iterator[tuple[int, np.ndarray]]:
    """Where the blocks of each batch begin, and their checksums, uint32 [rows of the batch].

    Raises if the file has anything other than such batches.
    """
    if source.read(len(MAGIC), 0) != MAGIC:
        raise _Damaged("it is not an Arrow file")
    at = _after_metadata(source, len(MAGIC))  # the schema
    for done in range(0, rows, most := batch_rows(size)):
        watch.step()
        count = min(most, rows - done)
        at = _after_metadata(source, at)
        sums = at + _padded(count * size)
        yield at, np.frombuffer(source.read(4 * count, sums), np.uint32)
        at = sums + _padded(4 * count)
    if source.read(MESSAGE.size, at) != MESSAGE.pack(CONTINUES, 0):
        raise _Damaged(f"it does not end after {rows} blocks of {size} bytes")


def _after_metadata(source: Source, at: int) -> int:
    mark, length = MESSAGE.unpack(source.read(MESSAGE.size, at))
    if mark != CONTINUES or not 0 < length <= METADATA_BYTES:
        raise _Damaged(f"it has no batch of blocks at byte {at}")
    return at + MESSAGE.size + int(length)


def _blocks(
    source: Source, bodies: list[tuple[int, np.ndarray]], size: int, first: int, count: int, watch: Watch
) -> Iterator[tuple[int, np.ndarray, int]]:
    """Number, bytes (uint8 [size]) and checksum of each of a file's blocks ``first`` to ``first + count``."""
    begin, piece = 0, max(1, PIECE_BYTES // size)
    for body, sums in bodies:
        wanted = range(max(first - begin, 0), min(first + count - begin, len(sums)))
        for at in wanted[::piece]:
            some = min(piece, wanted.stop - at)
            data = np.frombuffer(source.read(some * size, body + at * size), np.uint8).reshape(some, size)
            watch.step()
            for row, block in enumerate(data, at):
                yield begin + row, block, int(sums[row])
        begin += len(sums)


def batch_rows(size: int) -> int:
    """Blocks, of ``size`` bytes each, in all batches of a file but the last."""
    return max(1, BATCH_BYTES // size)


def _padded(count: int) -> int:
    """Bytes that a buffer of this size takes in a file."""
    return -(-count // 8) * 8
