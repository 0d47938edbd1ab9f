"""Files of blocks, intact or hostile: the same bytes or an error, whatever a file's metadata says."""

from __future__ import annotations

import os
import resource
import signal
import stat
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distkv_dask.errors import SavedDocumentError
from distkv_dask.local_folder import LocalFolder
from distkv_dask.messages.names import SavedFile
from distkv_dask.watch import Watch
from distkv_dask.worker.blocks import storage
from distkv_dask.worker.blocks.pool import BlockShape, Pool

BLOCK, BLOCKS = 4, 7
SIZE = 2 * 1 * BLOCK * 2 * 4
NAME = "blocks-00-0-28.arrow"


def filled() -> Pool:
    """A pool whose sequence 1 has blocks that are not consecutive."""
    pool = Pool(BlockShape(1, 1, 2, "float32", BLOCK), BLOCKS + 2)
    pool.reserve(1, 0, 2 * BLOCK)
    pool.reserve(2, 0, BLOCK)
    pool.reserve(1, 2 * BLOCK, BLOCKS * BLOCK)
    for block, data in enumerate(np.random.default_rng(0).integers(0, 256, (BLOCKS + 2, pool.block_bytes), np.uint8)):
        pool.fill(block, data)
    return pool


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "BATCH_BYTES", 3 * SIZE)
    monkeypatch.setattr(storage, "PIECE_BYTES", 2 * SIZE)


def write(folder: Path, pool: Pool) -> SavedFile:
    return storage.write_blocks(pool, 1, 0, BLOCKS * BLOCK, LocalFolder(folder), NAME, Watch(), True)


def read(folder: Path, file: SavedFile, first: int = 0, count: int = BLOCKS) -> Iterator[np.ndarray]:
    return storage.read_rows(LocalFolder(folder), file, SIZE, BLOCK, first, count, Watch())


@pytest.mark.usefixtures("small_batches")
def test_other_readers_of_arrow_files_see_the_blocks_and_so_do_we(tmp_path: Path) -> None:
    pool = filled()
    file = write(tmp_path, pool)
    table = pa.ipc.open_file(tmp_path / NAME).read_all()
    expected = [pool.read([block]).tobytes() for block in pool.table(1)]
    assert table["block"].to_pylist() == expected
    assert table["crc32"].to_pylist() == [zlib.crc32(block) for block in expected]
    assert [one.num_rows for one in pa.ipc.open_file(tmp_path / NAME).read_all().to_batches()] == [3, 3, 1]
    for first in range(BLOCKS):
        for count in range(BLOCKS - first + 1):
            assert [row.tobytes() for row in read(tmp_path, file, first, count)] == expected[first : first + count]
    with pytest.raises(SavedDocumentError, match="7 blocks"):
        list(read(tmp_path, file, 5, 3))


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_nobody_else_can_read_a_file_whatever_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        folder = LocalFolder(tmp_path / "a" / "b")
        folder.make()
        write(folder.path, filled())
    finally:
        os.umask(before)
    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder.path.parent, *folder.path.parent.rglob("*"))
    }
    assert modes == {"a": 0o700, "b": 0o700, NAME: 0o600}


def other_schema(rows: int, pool: Pool, **options: Any) -> bytes:
    """A file with this many rows as any Arrow library would write it."""
    sink = pa.BufferOutputStream()
    blocks = [pool.read([block]).tobytes() for block in pool.table(1)]
    column = pa.array((blocks * (rows // BLOCKS + 1))[:rows], pa.binary(SIZE))
    sums = pa.array([zlib.crc32(one.as_py()) for one in column], pa.uint32())
    batch = pa.record_batch([column, sums], ["block", "crc32"])
    with pa.ipc.new_file(sink, batch.schema, options=pa.ipc.IpcWriteOptions(**options)) as file:
        file.write_batch(batch)
    return sink.getvalue().to_pybytes()


def declare_rows(data: bytes, rows: int, said: int) -> bytes:
    """Change every length of this many rows in a file's metadata."""
    return data.replace(struct.pack("<q", rows), struct.pack("<q", said))


def hostile_files(pool: Pool) -> Iterator[tuple[str, bytes]]:
    whole = other_schema(BLOCKS, pool)
    yield "declares 100,000 rows", declare_rows(whole, BLOCKS, 100_000)
    yield "declares 2**62 rows", declare_rows(whole, BLOCKS, 2**62)
    yield "declares a negative length", declare_rows(whole, BLOCKS, -1)
    yield "compressed", other_schema(BLOCKS, pool, compression="zstd")
    yield "more rows", other_schema(BLOCKS + 1, pool)
    yield "fewer rows", other_schema(BLOCKS - 1, pool)
    yield "no Arrow", b"\0" * len(whole)
    yield "metadata of 2 GB", whole[:12] + struct.pack("<i", 2**31 - 1) + whole[16:]
    yield "metadata of negative size", whole[:12] + struct.pack("<i", -(2**31)) + whole[16:]
    yield "empty", b""


def test_what_a_file_says_of_itself_is_not_believed(tmp_path: Path) -> None:
    pool = filled()
    expected = [pool.read([block]).tobytes() for block in pool.table(1)]
    right = write(tmp_path, pool)
    for what, data in hostile_files(pool):
        (tmp_path / NAME).write_bytes(data)
        try:
            rows = [row.tobytes() for row in read(tmp_path, right._replace(bytes=len(data)))]
        except SavedDocumentError:
            continue
        assert what.startswith("declares"), what
        assert rows == expected, what


def test_a_small_file_that_unpacks_to_much_costs_no_memory(tmp_path: Path) -> None:
    size = 64 << 20
    column = pa.array([b"\0" * size] * 8, pa.binary(size))
    sums = pa.array([zlib.crc32(b"\0" * size)] * 8, pa.uint32())
    batch = pa.record_batch([column, sums], ["block", "crc32"])
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(tmp_path / NAME, batch.schema, options=options) as file:
        file.write_batch(batch)
    found = (tmp_path / NAME).stat().st_size
    assert found < 1 << 20
    del column, batch
    file = SavedFile(NAME, 0, 8 * BLOCK, found, zlib.crc32(sums.to_numpy().tobytes()))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SavedDocumentError):
        list(storage.read_rows(LocalFolder(tmp_path), file, size, BLOCK, 0, 8, Watch()))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000, "kilobytes"


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_file_with_any_damage_gives_the_same_bytes_or_an_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    pool = filled()
    file = write(folder, pool)
    expected = [pool.read([block]).tobytes() for block in pool.table(1)]
    whole = (folder / NAME).read_bytes()
    broken = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(broken) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "swap"])):
            case "flip":
                broken[at] ^= data.draw(st.integers(1, 255))
            case "cut":
                del broken[at : at + data.draw(st.integers(1, 64))]
            case "insert":
                broken[at:at] = data.draw(st.binary(min_size=1, max_size=64))
            case "swap":
                other = data.draw(st.integers(0, len(broken) - 1))
                broken[at], broken[other] = broken[other], broken[at]
    (folder / NAME).write_bytes(broken)
    honest = data.draw(st.booleans())
    try:
        rows = [row.tobytes() for row in read(folder, file if honest else file._replace(bytes=len(broken)))]
    except SavedDocumentError:
        return
    assert rows == expected


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "a\\b", "", ".", "..", "a\0b", "blocks-\0"])
def test_a_name_that_leads_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    (tmp_path / "x").write_text("mine")
    with pytest.raises(SavedDocumentError, match="not the name of a file"):
        list(read(folder, SavedFile(name, 0, BLOCK, 4, 0)))
    with pytest.raises(SavedDocumentError, match="not the name of a file"):
        LocalFolder(folder).delete(name)
    with pytest.raises(SavedDocumentError, match="not the name of a file"):
        storage.write_blocks(filled(), 1, 0, BLOCK, LocalFolder(folder), name, Watch(), True)
    assert (tmp_path / "x").read_text() == "mine"


def test_a_pipe_or_a_folder_in_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    file = write(tmp_path, filled())
    (tmp_path / NAME).unlink()
    os.mkfifo(tmp_path / NAME)
    with pytest.raises(SavedDocumentError, match="no plain file"):
        list(read(tmp_path, file))
    (tmp_path / NAME).unlink()
    (tmp_path / NAME).mkdir()
    with pytest.raises(SavedDocumentError, match="no plain file"):
        list(read(tmp_path, file))


def test_a_disk_that_is_full_keeps_nothing_of_a_file(tmp_path: Path) -> None:
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        with pytest.raises(SavedDocumentError, match="could not be written"):
            write(tmp_path, filled())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []
