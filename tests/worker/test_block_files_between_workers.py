"""Blocks on the disks of several workers are read back unchanged from any of them, or an error says why not."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distkv_dask.config import Config
from distkv_dask.errors import SavedDocumentError
from distkv_dask.messages.from_worker import Fetched, Stored
from distkv_dask.messages.names import OWN_DISK, Saved, SpilledFile, Transfer
from distkv_dask.worker.blocks import files as block_files
from distkv_dask.worker.blocks.files import BlockFiles
from distkv_dask.worker.blocks.pool import BlockShape, Pool
from distkv_dask.worker.blocks.spilled import Spilled

BLOCK, TOKENS = 4, 40
SPILL = Transfer("spill", -1)
SHAPE = BlockShape(1, 1, 2, "float32", BLOCK)


class Usage(NamedTuple):
    free: int


class Workers:
    """Workers with pools and disks, which request blocks from each other."""

    def __init__(self, folder: Path, names: str, **config: float) -> None:
        self.told: list[Any] = []
        self.asked: list[tuple[str, int, int]] = []
        self.pools = {name: Pool(SHAPE, 20) for name in names}
        self.files = {
            name: BlockFiles(
                name, Spilled(pool, folder / name, Config.load(**config)), Config.load(**config), self.told.append
            )
            for name, pool in self.pools.items()
        }

    async def peer(self, file: SpilledFile, first: int, count: int) -> Any:
        self.asked.append((file.worker, first, count))
        try:
            return await self.files[file.worker].rows(file, first, count)
        except SavedDocumentError as error:
            return str(error)

    def close(self) -> None:
        for one in self.files.values():
            one.close()


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(block_files, "PIECE_BYTES", 2 * SHAPE.nbytes)
    return


cuts = st.sets(st.integers(1, TOKENS // BLOCK - 1), max_size=4).map(
    lambda at: [(a * BLOCK, b * BLOCK) for a, b in zip([0, *sorted(at)], [*sorted(at), TOKENS // BLOCK], strict=True)]
)


@pytest.mark.usefixtures("small_pieces")
@settings(max_examples=25, deadline=None)
@given(
    written=cuts, wanted=cuts, owners=st.lists(st.sampled_from("abc"), min_size=5, max_size=5), last=st.integers(0, 3)
)
def test_what_several_workers_wrote_is_read_back_in_any_other_division(
    tmp_path_factory: pytest.TempPathFactory,
    written: list[tuple[int, int]],
    wanted: list[tuple[int, int]],
    owners: list[str],
    last: int,
) -> None:
    workers = Workers(tmp_path_factory.mktemp("disks"), "abcd", spill=10**6)
    tokens = TOKENS - last  # the last block is not full
    written, wanted = ([(a, min(b, tokens)) for a, b in some] for some in (written, wanted))
    content = torch.rand(TOKENS // BLOCK, *workers.pools["a"].storage.shape[1:])
    files: list[SpilledFile] = []

    async def run() -> None:
        for (start, stop), owner in zip(written, owners, strict=False):
            pool = workers.pools[owner]
            pool.reserve(1, start, stop)
            pool.storage[pool.find(1, [(start, stop)])] = content[start // BLOCK : -(-stop // BLOCK)]
            await workers.files[owner].store(SPILL, 1, [(start, stop)], Saved(OWN_DISK, tag=f"t{start}"))
            stored = workers.told.pop()
            assert isinstance(stored, Stored)
            assert stored.error is None
            files.extend(SpilledFile(*file, owner) for file in stored.files)
        target = workers.pools["d"]
        target.reserve(9, 0, BLOCK)
        for start, stop in wanted:
            target.reserve(1, start, stop)
        target.storage.zero_()
        await workers.files["d"].fetch(workers.peer, 1, wanted, Saved(OWN_DISK, tuple(files)))
        assert workers.told.pop() == Fetched("d", 1)
        assert torch.equal(target.storage[list(target.table(1))], content)
        assert not target.storage[list(target.table(9))].any(), "nothing lands in others' blocks"
        assert all(count <= 2 for _, _, count in workers.asked), "no piece is larger than allowed"
        assert sum(count for _, _, count in workers.asked) == TOKENS // BLOCK

    asyncio.run(run())
    workers.close()


def spilled(workers: Workers) -> Saved:
    """Five blocks of sequence 1 on the disk of worker a."""
    pool = workers.pools["a"]
    pool.reserve(1, 0, 20)
    pool.storage.copy_(torch.rand(pool.storage.shape))
    asyncio.run(workers.files["a"].store(SPILL, 1, [(0, 8), (8, 20)], Saved(OWN_DISK, tag="t")))
    stored = workers.told.pop()
    return Saved(OWN_DISK, tuple(SpilledFile(*file, "a") for file in stored.files))


def fetched(workers: Workers, saved: Saved, peer: Any = None) -> Any:
    workers.pools["b"].reserve(1, 0, 20)
    asyncio.run(workers.files["b"].fetch(peer or workers.peer, 1, [(0, 20)], saved))
    answer = workers.told.pop()
    assert isinstance(answer, Fetched)
    return answer.error


def test_what_another_workers_disk_lost_or_damaged_is_an_error_that_says_so(tmp_path: Path) -> None:
    workers = Workers(tmp_path, "ab", spill=10**6)
    saved = spilled(workers)
    assert fetched(workers, saved) is None
    path = tmp_path / "a" / saved.files[1].name
    whole = path.read_bytes()
    at = whole.index(workers.pools["a"].storage[workers.pools["a"].table(1)[3]].numpy().tobytes())
    path.write_bytes(whole[: at + 5] + b"x" + whole[at + 6 :])
    assert isinstance(fetched(workers, saved), SavedDocumentError)
    path.unlink()
    assert saved.files[1].name in str(fetched(workers, saved))
    workers.close()
    assert not (tmp_path / "a").exists(), "the own disk is empty when the engine is closed"
    workers.close()


def test_a_worker_that_does_not_answer_is_not_waited_for_without_end(tmp_path: Path) -> None:
    workers = Workers(tmp_path, "ab", spill=10**6, timeout_receive=0.05)

    async def silent(file: SpilledFile, first: int, count: int) -> Any:
        await asyncio.sleep(60)

    assert fetched(workers, spilled(workers), silent) is not None
    workers.close()


SHORT = {
    "one block": lambda rows: rows[:1],
    "not all bytes": lambda rows: rows[:, 8:],
    "other numbers": lambda rows: rows.view("<u4"),
}


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("change", SHORT.values(), ids=SHORT)
def test_blocks_that_came_short_are_an_error_and_never_fill_others(change: Any, tmp_path: Path) -> None:
    workers = Workers(tmp_path, "ab", spill=10**6)

    async def short(file: SpilledFile, first: int, count: int) -> Any:
        return change(await workers.peer(file, first, count))

    workers.pools["b"].storage.zero_()
    error = fetched(workers, spilled(workers), short)
    assert isinstance(error, SavedDocumentError)
    assert f"in place of 2 blocks of {SHAPE.nbytes} bytes" in str(error)
    assert not workers.pools["b"].storage.any()
    workers.close()


def test_a_store_that_fails_in_the_middle_leaves_no_file(tmp_path: Path) -> None:
    workers = Workers(tmp_path, "a", spill=10**6)
    workers.pools["a"].reserve(1, 0, 8)
    for place in (OWN_DISK, str(tmp_path / "folder")):
        saved = Saved(place, tag="t")
        asyncio.run(workers.files["a"].store(SPILL, 1, [(0, 8), (8, 16)], saved))  # the second part is not here
        stored = workers.told.pop()
        assert stored.files == ()
        assert stored.error is not None
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    workers.close()


def test_files_are_deleted_after_they_were_written_and_others_stay(tmp_path: Path) -> None:
    workers = Workers(tmp_path, "a", spill=10**6)
    saved = spilled(workers)
    first, second = (tmp_path / "a" / file.name for file in saved.files)
    assert first.exists()
    workers.files["a"].discard([first.name, "never was"])
    rows = asyncio.run(workers.files["a"].rows(saved.files[1], 1, 2))  # type: ignore[arg-type]
    assert rows.shape == (2, SHAPE.nbytes)
    assert rows.dtype == np.uint8
    workers.files["a"]._disk.submit(int).result()
    assert not first.exists()
    assert second.exists()
    workers.close()


@pytest.mark.parametrize(("spill", "free", "capacity"), [(1000, 5000, 1000), (4000, 5000, 2500), (0, 5000, 0)])
def test_no_more_than_half_of_a_free_disk_is_filled(
    spill: int, free: int, capacity: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(free))
    workers = Workers(tmp_path, "a", spill=spill)
    assert workers.files["a"].spilled.disk_bytes == capacity
    workers.close()
