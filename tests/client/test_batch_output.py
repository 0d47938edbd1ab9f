"""A batch's output has every finished row once, whatever file is truncated where, and belongs to one job at a time."""

from __future__ import annotations

import errno
import multiprocessing
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distkv_dask.client.batch import output as module
from distkv_dask.client.batch.output import JOURNAL, RESULT, Output
from distkv_dask.errors import OutputError
from distkv_dask.local_folder import sync

SCHEMA = pa.schema([("row", pa.int64()), ("id", pa.string()), *RESULT])
PARAMETERS = {"model": "m", "sampling": {"seed": 1, "stop": ["x"]}, "questions": ["What?"]}


def rows(*labels: int, error: str | None = None) -> pa.RecordBatch:
    common = {"question": "What?", "fingerprint": "f", "error": error, "answer": None if error else "a"}
    return pa.RecordBatch.from_pylist([{"row": label, "id": str(label), **common} for label in labels], SCHEMA)


def labels(path: Path) -> list[int]:
    return sorted(pq.read_table(path).column("row").to_pylist())


@pytest.fixture
def never_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """Journals become Parquet files only when a test says so."""
    monkeypatch.setattr(module, "PART_AGE", (1e9, 1.0))


def abandon(output: Output) -> None:
    """The state that a killed process leaves: all files as they are, and no lock."""
    output._lock.release()


def test_the_output_can_be_read_from_the_first_moment_and_grows(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "PART_AGE", (0.0, 0.0))
    with Output(tmp_path / "out", SCHEMA, PARAMETERS) as output:
        assert pq.read_table(tmp_path / "out").schema.names == SCHEMA.names
        output.append(rows(3, 1))
        assert labels(tmp_path / "out") == [1, 3]
        output.append(rows(2))
        assert labels(tmp_path / "out") == [1, 2, 3]


@pytest.mark.usefixtures("never_due")
def test_finished_rows_survive_a_crash_wherever_it_cuts_the_journal(tmp_path: Path) -> None:
    output = Output(tmp_path, SCHEMA, PARAMETERS)
    sizes = []
    (journal,) = [tmp_path / f"{JOURNAL}000001"]
    for label in range(4):
        output.append(rows(label))
        sizes.append(journal.stat().st_size)
    abandon(output)
    whole = journal.read_bytes()
    for cut in {
        0,
        1,
        *range(sizes[0] - 9, sizes[0] + 9),
        sizes[2] - 1,
        sizes[3] - 1,
        sizes[3],
        *range(0, sizes[3], 97),
    }:
        for part in tmp_path.glob("part-000001*"):
            part.unlink()
        journal.write_bytes(whole[:cut])
        again = Output(tmp_path, SCHEMA, PARAMETERS)
        kept = sum(size <= cut for size in sizes)
        assert sorted(label for label, _ in again.done) == list(range(kept)), cut
        assert labels(tmp_path) == list(range(kept))
        assert not journal.exists()
        abandon(again)


@pytest.mark.usefixtures("never_due")
def test_a_crash_between_a_parquet_file_and_its_journals_end_doubles_no_row(tmp_path: Path) -> None:
    output = Output(tmp_path, SCHEMA, PARAMETERS)
    output.append(rows(7, 8))
    journal = (tmp_path / f"{JOURNAL}000001").read_bytes()
    output.close()
    (tmp_path / f"{JOURNAL}000001").write_bytes(journal)
    (tmp_path / "_unfinished-part-000002.parquet").write_bytes(b"half")
    with Output(tmp_path, SCHEMA, PARAMETERS) as again:
        assert labels(tmp_path) == [7, 8]
        again.append(rows(9))
    assert labels(tmp_path) == [7, 8, 9]
    assert not list(tmp_path.glob("_unfinished*"))


def test_another_question_or_model_is_refused_by_name(tmp_path: Path) -> None:
    Output(tmp_path, SCHEMA, PARAMETERS).close()
    changed = PARAMETERS | {"model": "n", "sampling": {"seed": 2, "stop": ["x"]}}
    with pytest.raises(OutputError, match=r"model was 'm', is 'n'; sampling.seed was 1, is 2\)"):
        Output(tmp_path, SCHEMA, changed)
    with pytest.raises(OutputError, match=r"columns.id was 'string', is 'int64'"):
        Output(tmp_path, SCHEMA.set(1, pa.field("id", pa.int64())), PARAMETERS)
    Output(tmp_path, SCHEMA, PARAMETERS).close()  # a refusal leaves nothing locked


def test_somebody_elses_folder_or_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match=r"not an output of distkv \(it contains letter.txt\)"):
        Output(tmp_path, SCHEMA, PARAMETERS)
    with pytest.raises(OutputError, match="is a file"):
        Output(tmp_path / "letter.txt", SCHEMA, PARAMETERS)
    assert not list(tmp_path.glob("part*"))


def _open_elsewhere(path: Path, answer: Any) -> None:
    try:
        Output(path, SCHEMA, PARAMETERS).close()
        answer.put("opened")
    except OutputError as error:
        answer.put(str(error))


def test_two_processes_do_not_write_the_same_output(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    with Output(tmp_path, SCHEMA, PARAMETERS):
        other = context.Process(target=_open_elsewhere, args=(tmp_path, answer))
        other.start()
        assert "being written to by another process" in answer.get(timeout=30)
        other.join(30)


def test_rows_with_errors_are_dropped_when_they_are_to_be_done_again(tmp_path: Path) -> None:
    with Output(tmp_path, SCHEMA, PARAMETERS) as output:
        output.append(rows(1, 2))
        output.append(rows(3, error="no"))
    with Output(tmp_path, SCHEMA, PARAMETERS) as again:
        assert again.errors == 1
        assert len(again.done) == 3
    with Output(tmp_path, SCHEMA, PARAMETERS, retry_errors=True) as again:
        assert again.errors == 0
        assert sorted(label for label, _ in again.done) == [1, 2]
        assert labels(tmp_path) == [1, 2]


NEVER = (1e9, 1.0)
WANTED = {label: f"answer {label}" for label in range(8)}


def numbered(*labels: int) -> pa.RecordBatch:
    common = {"question": "What?", "fingerprint": "f"}
    found = [{"row": label, "id": str(label), "answer": WANTED[label], **common} for label in labels]
    return pa.RecordBatch.from_pylist(found, SCHEMA)


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """An output folder after a crash of its machine: three Parquet files, a journal of five rows, and more."""
    path = tmp_path_factory.mktemp("crashed") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PART_AGE", NEVER)
        output = Output(path, SCHEMA, PARAMETERS)
        for some in ([0, 1], [2]):
            output.append(numbered(*some))
            output.rotate(now=True)
        for label in range(3, 8):
            output.append(numbered(label))
        abandon(output)
    return {file.name: file.read_bytes() for file in path.iterdir()}


DAMAGES: dict[str, Callable[[bytes, int, bytes], bytes | None]] = {
    "cut": lambda data, at, _: data[:at],
    "flip": lambda data, at, noise: data[:at] + bytes([data[at] ^ (noise[0] or 1)]) + data[at + 1 :] if data else b"x",
    "zero the rest": lambda data, at, _: data[:at] + bytes(len(data) - at),
    "garbage for the rest": lambda data, at, noise: data[:at] + (noise * len(data))[: len(data) - at],
    "insert": lambda data, at, noise: data[:at] + noise + data[at:],
    "append": lambda data, _, noise: data + noise,
    "missing": lambda *_: None,
}


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(
        sorted(["_distkv.json", "_digests", "_journal-000003", "_lock", *(f"part-{n:06}.parquet" for n in range(3))])
    ),
    st.sampled_from(sorted(DAMAGES)),
    st.floats(0, 1, exclude_max=True),
    st.binary(min_size=1, max_size=20),
)
def test_whatever_a_crash_made_of_a_file_no_row_is_lost_doubled_or_changed_or_the_file_is_named(
    tmp_path_factory: pytest.TempPathFactory, crashed: dict[str, bytes], name: str, how: str, where: float, noise: bytes
) -> None:
    assert set(crashed) == {
        "_distkv.json",
        "_digests",
        "_journal-000003",
        "_lock",
        *(f"part-{n:06}.parquet" for n in range(3)),
    }
    path = tmp_path_factory.mktemp("damaged")
    for other, data in crashed.items():
        (path / other).write_bytes(data)
    damaged = DAMAGES[how](crashed[name], int(where * len(crashed[name])), noise)
    if damaged is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes(damaged)
    refused = ""
    try:
        Output(path, SCHEMA, PARAMETERS).close()
    except OutputError as error:
        refused = str(error)
    if refused:
        assert name in refused
        assert "delete it" in refused
        (path / name).unlink()
    with Output(path, SCHEMA, PARAMETERS) as output:
        for label in WANTED:
            if (label, "What?") not in output.done:
                output.append(numbered(label))
    found = pq.read_table(path).sort_by("row")
    assert dict(zip(found["row"].to_pylist(), found["answer"].to_pylist(), strict=True)) == WANTED
    assert found.num_rows == len(WANTED)


def test_a_damaged_file_is_made_anew_from_its_journal_while_that_is_there(
    tmp_path: Path, crashed: dict[str, bytes]
) -> None:
    for name, data in crashed.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "part-000003.parquet").write_bytes(crashed["part-000001.parquet"][:500])
    with Output(tmp_path, SCHEMA, PARAMETERS):
        assert labels(tmp_path) == list(range(8))


@pytest.mark.usefixtures("never_due")
def test_damage_within_a_journal_costs_the_rows_that_it_hit_and_is_told(
    tmp_path: Path, crashed: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    for name, data in crashed.items():
        (tmp_path / name).write_bytes(data)
    journal = crashed["_journal-000003"]
    at = journal.index(b"answer 5")
    (tmp_path / "_journal-000003").write_bytes(journal[:at] + b"ANSWER" + journal[at + 6 :])
    with Output(tmp_path, SCHEMA, PARAMETERS) as output:
        assert sorted(label for label, _ in output.done) == [0, 1, 2, 3, 4, 6, 7]
    assert "_journal-000003 ends within a row or is damaged: 4 rows" in caplog.text


def test_a_lost_manifest_is_written_again_and_still_refuses_other_parameters(
    tmp_path: Path, crashed: dict[str, bytes]
) -> None:
    for name, data in crashed.items():
        (tmp_path / name).write_bytes(data)
    for damaged in (b"", b"{}", b"[" * 100_000, crashed["_distkv.json"].replace(b'"m"', b'"n"')):
        (tmp_path / "_distkv.json").write_bytes(damaged)
        with pytest.raises(OutputError, match="model was 'm', is 'n'"):
            Output(tmp_path, SCHEMA, PARAMETERS | {"model": "n"})
        Output(tmp_path, SCHEMA, PARAMETERS).close()
        assert (tmp_path / "_distkv.json").read_bytes() == crashed["_distkv.json"]


def test_a_copy_of_a_file_does_not_double_its_rows(tmp_path: Path) -> None:
    with Output(tmp_path, SCHEMA, PARAMETERS) as output:
        output.append(rows(1, 2))
    (tmp_path / "part-000007.parquet").write_bytes((tmp_path / "part-000001.parquet").read_bytes())
    with pytest.raises(OutputError, match=r"part-000007.parquet holds rows twice"):
        Output(tmp_path, SCHEMA, PARAMETERS)


@pytest.mark.usefixtures("never_due")
@pytest.mark.parametrize("call", ["fsync", "replace", "write_table"])
def test_a_disk_that_fills_up_keeps_what_was_answered_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    output = Output(tmp_path, SCHEMA, PARAMETERS)
    output.append(rows(1, 2))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(
            *{"fsync": (os, "fsync"), "replace": (Path, "replace"), "write_table": (pq, "write_table")}[call], full
        )
        with pytest.raises(OutputError, match="No space left"):
            output.append(rows(3)) if call == "fsync" else output.rotate(now=True)
        output.close()
    assert not list(tmp_path.glob("_unfinished*"))
    with Output(tmp_path, SCHEMA, PARAMETERS) as again:
        assert {1, 2} <= {label for label, _ in again.done}


def test_what_a_journal_promises_is_on_disk_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    with Output(tmp_path / "out", SCHEMA, PARAMETERS) as output:
        monkeypatch.setattr(os, "fsync", noted)
        output.append(rows(1))
        assert synced[:2] == ["out", "_journal-000001"]


def test_a_filesystem_that_does_not_sync_folders_holds_an_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:  # as some network disks do it
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with Output(tmp_path / "out", SCHEMA, PARAMETERS) as output:
        output.append(rows(1))
    with Output(tmp_path / "out", SCHEMA, PARAMETERS) as output:
        output.append(rows(2))
    assert labels(tmp_path / "out") == [1, 2]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs a filesystem that syncs nothing")
def test_files_that_are_not_on_disk_are_never_said_to_be() -> None:
    sync(Path("/proc"))
    with pytest.raises(OSError, match="Invalid argument"):
        sync(Path("/proc/self/status"))
