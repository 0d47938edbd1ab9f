"""A home's own data of a document is saved and read like its blocks: the same bytes, or an error that says why."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from distkv_dask.errors import SavedDocumentError, StateLostError
from distkv_dask.geometry import Geometry, LayerKind
from distkv_dask.local_folder import LocalFolder
from distkv_dask.messages.names import SavedFile
from distkv_dask.watch import Watch
from distkv_dask.worker.blocks.pool import BlockShape, Pool
from distkv_dask.worker.blocks.storage import all_or_none
from distkv_dask.worker.home.home_files import HomeFiles
from distkv_dask.worker.home.home_state import HomeState
from distkv_dask.worker.home.windows import Windows

GEOMETRY = Geometry(
    3, 1, 1, 8, 10, 0, "float32", (LayerKind("sliding", 20), LayerKind(), LayerKind("chunked", 9)), state_bytes=72
)
TEMPLATE = {(1, True, 0): torch.zeros(1, 2, 3), (0, False, 1): torch.zeros(1, 4, 3, dtype=torch.float32)}
TOKENS = 48


class Home:
    """A home of one sequence, or of none."""

    def __init__(self, template: dict = TEMPLATE) -> None:
        self.windows = Windows(GEOMETRY, Pool(BlockShape.of(GEOMETRY, 8, GEOMETRY.home_layers), 40), "home", 16)
        kept = HomeState(self.windows)
        self.states, self.files = kept.states, HomeFiles(kept, template)

    def read(self, sequence: int, folder: LocalFolder, files: Iterable[SavedFile]) -> None:
        for file in self.files.wanted(TOKENS, files):
            rows = self.files.rows(folder, file, 0, self.files.shape(file)[0], Watch())
            self.files.fill(sequence, file, rows, Watch())

    def fill(self) -> None:
        self.states.put(1, TOKENS, {slot: torch.randn_like(one) for slot, one in TEMPLATE.items()})
        self.windows.put(1, TOKENS)
        for block in self.windows.pool.table(1):
            self.windows.pool.storage[block] = torch.randn(self.windows.pool.storage.shape[1:])


@pytest.fixture
def folder(tmp_path: Path) -> LocalFolder:
    made = LocalFolder(tmp_path / "saved")
    made.make()
    return made


def test_another_home_goes_on_with_the_same_bytes(folder: LocalFolder) -> None:
    one, other = Home(), Home()
    one.fill()
    files = [*one.files.write(1, TOKENS, folder, "00ff", Watch())]
    assert [(file.name.partition("-")[0], file.start, file.stop) for file in files] == [
        ("state", 0, TOKENS), ("window", 24, TOKENS),
    ]  # fmt: skip
    other.windows.put(9, 16)  # so that other blocks are used
    other.read(7, folder, [SavedFile("blocks-00ff-0-48.arrow", 0, 48, 9, 9), *files])
    mine, theirs = one.states.begin_run(1, TOKENS), other.states.begin_run(7, TOKENS)
    assert all(torch.equal(mine[slot], theirs[slot]) for slot in TEMPLATE)
    pools = [(one.windows.pool, 1), (other.windows.pool, 7)]
    mine, theirs = ([pool.storage[block] for block in pool.table(number)] for pool, number in pools)
    assert len(mine) == 3
    assert all(torch.equal(*both) for both in zip(mine, theirs, strict=True))
    other.windows.begin_run(7, TOKENS, TOKENS + 5)


@pytest.mark.parametrize("kind", ["state", "window"])
def test_what_is_missing_damaged_or_of_another_length_is_said(kind: str, folder: LocalFolder) -> None:
    one, other = Home(), Home()
    one.fill()
    files = {file.name.partition("-")[0]: file for file in one.files.write(1, TOKENS, folder, "00ff", Watch())}
    rest = [file for name, file in files.items() if name != kind]
    for wrong in ([], [files[kind]._replace(stop=40)]):
        with pytest.raises(SavedDocumentError, match=f"no {kind} of layers after 48 tokens"):
            other.read(1, folder, rest + wrong)
    path = Path(folder.place) / files[kind].name
    data = bytearray(path.read_bytes())
    held = {
        "state": one.states.kept(1, TOKENS)[1, True, 0],
        "window": one.windows.pool.storage[one.windows.pool.table(1)[0]],
    }
    data[data.index(held[kind].numpy().tobytes()[:16])] ^= 1
    path.write_bytes(data)
    with pytest.raises(SavedDocumentError, match="damaged"):
        other.read(1, folder, files.values())


def test_what_is_not_here_cannot_be_written_and_leaves_nothing(folder: LocalFolder) -> None:
    home = Home()
    home.fill()
    home.windows.drop(1)
    with pytest.raises(StateLostError):
        all_or_none(home.files.write(1, TOKENS, folder, "00ff", Watch()), folder.delete)
    assert list(folder.names()) == []
