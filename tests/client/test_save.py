"""Saves in one folder: of several at the same time one is complete, and other files are left alone."""

from __future__ import annotations

import itertools
import os
import random
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distkv_dask.client.documents import save as saves
from distkv_dask.client.documents.save import Save
from distkv_dask.client.documents.saved_document import FILE, SavedDocument, document_in
from distkv_dask.errors import SavedDocumentError
from distkv_dask.filesystems import folder_at
from distkv_dask.local_folder import LocalFolder
from distkv_dask.messages.names import SavedFile
from distkv_dask.watch import Watch

PLACES = itertools.count()


def place_of(kind: str, tmp_path: Path) -> str:
    return str(tmp_path / "saved") if kind == "path" else f"{kind}://test-save-{os.getpid()}-{next(PLACES)}"


def document_of(save: Save, title: str) -> SavedDocument:
    file = SavedFile(f"blocks-{save.tag}-0-8.arrow", 0, 8, 16, 0)
    return SavedDocument(title, "model", "f", "float32", 8, 16, title, tuple(range(9)), (file,))


def write_blocks(save: Save) -> None:
    """Write blocks as a worker does."""
    with folder_at(save.place).create(f"blocks-{save.tag}-0-8.arrow") as stream:
        stream.write(save.tag.encode())


def whole_in(place: str) -> str:
    """The title of the document in a folder, all of whose files are there."""
    folder = folder_at(place)
    document = document_in(folder)
    for file in document.files:
        with folder.open(file.name) as source:
            assert source.read(16, 0).decode() in file.name
    return document.name


@pytest.mark.parametrize("kind", ["path", "memory"])
def test_the_folder_has_the_last_document_and_nothing_else_of_ours(kind: str, tmp_path: Path) -> None:
    place = place_of(kind, tmp_path)
    for title in ("first", "second", "third"):
        save = Save(Watch(), place)
        write_blocks(save)
        save.commit(Watch(), document_of(save, title))
        save.end(Watch())
        assert whole_in(place) == title
        assert len(folder_at(place).names()) == 2


MINE = [
    "blocks-notes.txt", "blocks-mine.arrow", "blocks-00ff-0-8.arrow", "document.json.bak", "document.json.unfinished",
    "blocks-00ff-0-8.arrow.unfinished", "document.json.0123456789abcdeX.saving",
]  # fmt: skip


def test_files_of_the_user_stay_whatever_they_are_called(tmp_path: Path) -> None:
    place = tmp_path / "saved"
    place.mkdir()
    for name in MINE:
        (place / name).write_text("mine")
    for title in ("first", "second"):
        save = Save(Watch(), str(place))
        write_blocks(save)
        save.commit(Watch(), document_of(save, title))
        save.end(Watch())
    failed = Save(Watch(), str(place))
    write_blocks(failed)
    failed.end(Watch())
    assert {name for name in MINE if (place / name).read_text() == "mine"} == {*MINE}
    assert len(list(place.iterdir())) == len(MINE) + 2


def test_a_document_there_that_names_files_of_the_user_deletes_none(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / FILE).write_text('{"files": [["thesis.txt", 0, 8, 4, 0], ["../x", 0, 8, 4, 0]]}')
    save = Save(Watch(), str(tmp_path))
    write_blocks(save)
    save.commit(Watch(), document_of(save, "new"))
    save.end(Watch())
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    assert whole_in(str(tmp_path)) == "new"


@pytest.mark.parametrize("kind", ["path", "memory"])
def test_a_save_that_fails_leaves_the_document_before_it_and_nothing_of_itself(kind: str, tmp_path: Path) -> None:
    place = place_of(kind, tmp_path)
    save = Save(Watch(), place)
    write_blocks(save)
    save.commit(Watch(), document_of(save, "first"))
    save.end(Watch())
    failed = Save(Watch(), place)
    write_blocks(failed)
    failed.end(Watch())
    assert whole_in(place) == "first"
    assert len(folder_at(place).names()) == 2


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(["path", "memory"]), number=st.integers(2, 4))
def test_saves_at_once_in_any_order_leave_one_whole_document(
    seed: int, kind: str, number: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = place_of(kind, tmp_path_factory.mktemp("saves"))
    rng, committed = random.Random(seed), []

    def steps(title: str) -> list[Callable[[], None]]:
        save = Save(Watch(), place)

        def commit() -> None:
            save.commit(Watch(), document_of(save, title))
            committed.append(title)

        ends = [lambda: write_blocks(save), commit, lambda: save.end(Watch())]
        return ends[:1] + ends[2:] if rng.random() < 0.2 else ends

    waiting = [f"save {at}" for at in range(number)]
    running: list[list[Callable[[], None]]] = []
    while waiting or running:
        if waiting and (not running or rng.random() < 0.5):
            running.append(steps(waiting.pop()))
            continue
        one = rng.choice(running)
        one.pop(0)()
        running = [left for left in running if left]
        if committed:
            assert whole_in(place) == committed[-1]
    assert len(folder_at(place).names()) == (2 if committed else 0)


def test_saves_of_processes_that_were_killed_are_cleared_away_by_the_next(tmp_path: Path) -> None:
    place = str(tmp_path / "saved")
    for last in (write_blocks, lambda save: save.commit(Watch(), document_of(save, "killed after it"))):
        if (child := os.fork()) == 0:
            with suppress(BaseException):
                save = Save(Watch(), place)
                write_blocks(save)
                if last is not write_blocks:
                    last(save)
            os._exit(0)
        os.waitpid(child, 0)
    assert len(folder_at(place).names()) >= 3
    alive = Save(Watch(), place)
    write_blocks(alive)
    assert whole_in(place) == "killed after it"
    other = Save(Watch(), place)
    other.end(Watch())
    alive.commit(Watch(), document_of(alive, "new"))
    alive.end(Watch())
    assert whole_in(place) == "new"
    assert len(folder_at(place).names()) == 2


def test_without_locks_what_is_old_is_cleared_away(monkeypatch: pytest.MonkeyPatch) -> None:
    place = place_of("memory", Path())
    write_blocks(Save(Watch(), place))  # the save is never finished
    Save(Watch(), place).end(Watch())
    assert len(folder_at(place).names()) == 2, "perhaps it is still being written"
    monkeypatch.setattr(saves, "HELD_SECONDS", -1.0)
    Save(Watch(), place).end(Watch())
    assert folder_at(place).names() == []


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_a_saved_document_is_for_its_owner_alone(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        save = Save(Watch(), tmp_path / "in" / "saved")
        save.commit(Watch(), document_of(save, "secret"))
        save.end(Watch())
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"in": 0o700, "saved": 0o700, FILE: 0o600}


def test_all_is_on_the_disk_before_the_document_is_and_the_older_goes_after_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Save(Watch(), tmp_path)
    write_blocks(first)
    first.commit(Watch(), document_of(first, "first"))
    first.end(Watch())
    happened: list[str] = []
    sync, replace, delete = os.fsync, LocalFolder.replace, LocalFolder.delete

    def fsync(descriptor: int) -> None:
        happened.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        sync(descriptor)

    def record(what: str, call: Callable[..., None]) -> Callable[..., None]:
        def recorded(folder: LocalFolder, name: str, **options: str) -> None:
            happened.append(f"{what} {name}")
            call(folder, name, **options)

        return recorded

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(LocalFolder, "replace", record("replace", replace))
    monkeypatch.setattr(LocalFolder, "delete", record("delete", delete))
    save = Save(Watch(), tmp_path)
    write_blocks(save)
    save.commit(Watch(), document_of(save, "second"))
    folder, draft = f"sync {tmp_path.name}", f"sync {FILE}.{save.tag}.unfinished"
    blocks, old = f"sync blocks-{save.tag}-0-8.arrow", f"delete blocks-{first.tag}-0-8.arrow"
    assert happened[-7:] == [blocks, folder, draft, folder, f"replace {FILE}", folder, old]
    save.end(Watch())


@pytest.mark.parametrize("place", ["", "  ", "a\0b", None, 5, b"x", Path("s3://bucket/x"), "nowhere://at/all"])
def test_what_names_no_folder_is_refused(place: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SavedDocumentError):
        Save(Watch(), place)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_somebody_has_is_waited_for_until_the_save_is_given_up(tmp_path: Path) -> None:
    watch = Watch()
    with LocalFolder(tmp_path).lock(Watch()):
        threading.Timer(0.2, watch.give_up).start()
        began = time.monotonic()
        with pytest.raises(SavedDocumentError, match="too long"):
            Save(watch, tmp_path)
        assert time.monotonic() - began > 0.1
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_others_took_for_dead_does_not_become_the_document(tmp_path: Path) -> None:
    place = place_of("memory", tmp_path)
    slow = Save(Watch(), place)
    write_blocks(slow)
    folder = folder_at(place)
    for name in folder.names():
        folder.delete(name)
    with pytest.raises(SavedDocumentError, match="save again"):
        slow.commit(Watch(), document_of(slow, "slow"))
    slow.end(Watch())
    assert folder.names() == []
