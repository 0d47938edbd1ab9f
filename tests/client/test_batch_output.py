"""A batch's output holds every finished row once, whatever is cut off where, and belongs to one job at a time."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distkv_dask.client.batch import output as module
from distkv_dask.client.batch.output import JOURNAL, RESULT, Output
from distkv_dask.errors import OutputError

SCHEMA = pa.schema([("row", pa.int64()), ("id", pa.string()), *RESULT])
PARAMETERS = {"model": "m", "sampling": {"seed": 1, "stop": ["x"]}, "questions": ["What?"]}


def rows(*labels: int, error: str | None = None) -> pa.RecordBatch:
    common = {"question": "What?", "fingerprint": "f", "error": error, "answer": None if error else "a"}
    return pa.RecordBatch.from_pylist([{"row": label, "id": str(label), **common} for label in labels], SCHEMA)


def labels(path: Path) -> list[int]:
    return sorted(pq.read_table(path).column("row").to_pylist())


@pytest.fixture
def never_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """Journals become Parquet files only when they are told to."""
    monkeypatch.setattr(module, "PART_AGE", (1e9, 1.0))


def abandon(output: Output) -> None:
    """What is left of a process that was killed: everything as it is, and no lock."""
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
    with pytest.raises(OutputError, match=r"no output of distkv \(it holds letter.txt\)"):
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
