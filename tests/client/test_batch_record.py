"""The record of a batch says later what answered it, when, and what was refused; no tool takes it for data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dask.dataframe as dd
import pandas as pd
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_batch_row_errors import Engine, Rows, landing

from distkv_dask.client.batch.job import Job
from distkv_dask.client.batch.readme import in_words
from distkv_dask.client.batch.record import REASONS
from distkv_dask.client.batch.spec import BatchSpec
from distkv_dask.client.batch.target import Target
from distkv_dask.errors import TooManyErrorsError
from distkv_dask.sampling import SamplingParams
from distkv_dask.version import VERSION

__all__ = ["landing"]
SPEC = BatchSpec(questions=("Who?", "Where | when?"), sampling=SamplingParams(max_new_tokens=9))


def run(folder: Path, values: list[Any], **how: Any) -> None:
    rows = Rows([{"text": one} if isinstance(one, str) else one for one in values])
    Job(Engine(), rows, SPEC, how.pop("max_errors", None), 1).write(  # type: ignore[arg-type]
        Target(folder, None, "texts.parquet"), how.pop("retry_errors", False), False, **how
    )


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "_distkv.json").read_text())["record"]
    return found


def test_the_record_says_what_answered_and_what_came_of_it(tmp_path: Path) -> None:
    run(tmp_path / "out", ["one", "", "three"])
    found, table = record(tmp_path / "out"), pq.read_table(tmp_path / "out")
    assert (found["rows"], found["errors"]) == (6, 2)
    assert found["refused"] == [{"error": "the text is empty", "rows": 2}]
    assert found["finish_reasons"] == {"length": 4, "error": 2}
    for name in ("prompt_tokens", "new_tokens"):
        assert found[name] == sum(filter(None, table[name].to_pylist())) > 0
    (only,) = found["runs"]
    assert (only["how"], only["rows"], only["errors"]) == ("completed", 6, 2)
    assert (only["fingerprint"], only["workers"], only["source"]) == ("f00d", 1, "texts.parquet")
    assert only["versions"]["distkv-dask"] == VERSION
    assert only["settings"]["block_tokens"] == 4
    readme = (tmp_path / "out" / "_README.md").read_text()
    for said in (
        "f00d",
        "m (float32)",
        "texts.parquet",
        "Who?; Where \\| when?",
        "max_new_tokens=9",
        "| the text is empty | 2 |",
    ):
        assert said in readme


def test_runs_that_continue_are_recorded_with_those_before_them(tmp_path: Path) -> None:
    def kill(*_: int) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(folder, ["one", "two", "three"], on_tick=kill)
    first = record(folder)
    assert first["runs"][0]["how"].startswith("stopped: KeyboardInterrupt")
    assert 0 < first["rows"] == first["runs"][0]["rows"] < 6
    run(folder, ["one", "two", "three"])
    run(folder, ["one", "two", "three"])
    found = record(folder)
    assert [one["how"] for one in found["runs"][1:]] == ["completed"] * 2
    assert sum(one["rows"] for one in found["runs"]) == found["rows"] == 6
    assert found["runs"][2]["rows"] == 0
    assert (folder / "_README.md").read_text().count("| completed |") == 2


def test_a_run_that_was_killed_is_one_without_an_end(tmp_path: Path) -> None:
    seen = []
    folder = tmp_path / "out"
    run(folder, ["one"], on_tick=lambda *_: seen.append(record(folder)["runs"][-1]["how"]))
    assert set(seen) == {None}


def test_a_batch_that_fails_says_why_in_its_record(tmp_path: Path) -> None:
    with pytest.raises(TooManyErrorsError):
        run(tmp_path / "out", ["", ""], max_errors=0)
    assert "more than max_errors=0" in record(tmp_path / "out")["runs"][0]["how"]


def test_repeated_rows_are_no_longer_refused(tmp_path: Path) -> None:
    run(tmp_path / "out", ["one", ""])
    run(tmp_path / "out", ["one", ""], retry_errors=True)
    found = record(tmp_path / "out")
    assert (found["rows"], found["errors"], found["runs"][1]["rows"]) == (4, 2, 2)


def test_no_reader_takes_the_record_for_data(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    run(folder, ["one", "two"])
    run(folder, ["one", "two", "three"])
    assert {"_README.md", "_distkv.json"} <= {path.name for path in folder.iterdir()}
    for rows in (
        pq.read_table(folder).num_rows,
        ds.dataset(folder, format="parquet").count_rows(),
        len(pd.read_parquet(folder)),
        len(dd.read_parquet(folder)),
    ):
        assert rows == 6


def test_a_manifest_that_was_damaged_costs_the_record_of_earlier_runs_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    run(folder, ["one"])
    (folder / "_distkv.json").write_text("{")
    run(folder, ["one", "two"])
    assert (record(folder)["rows"], len(record(folder)["runs"])) == (4, 1)


def test_many_different_errors_are_counted_and_the_most_frequent_named(tmp_path: Path) -> None:
    run(tmp_path / "out", [KeyError(f"row {at}") for at in range(REASONS + 5)] + ["", ""])
    found = record(tmp_path / "out")
    assert len(found["refused"]) == REASONS
    assert sum(one["rows"] for one in found["refused"]) + found["refused_otherwise"] == found["errors"]


@given(st.text())
def test_whatever_an_error_says_it_stays_in_its_cell(text: str) -> None:
    run_ = {
        "began": "", "seconds": 1.0, "rows": 1, "errors": 1, "workers": 1, "versions": {"distkv-dask": "1"},
        "how": text, "fingerprint": "f", "source": text,
    }  # fmt: skip
    figures = dict.fromkeys(("rows", "errors", "prompt_tokens", "reused_tokens", "new_tokens", "refused_otherwise"), 0)
    said = {**figures, "refused": [{"error": text, "rows": 1}], "runs": [run_]}
    asked = {"model": "m", "dtype": "d", "questions": [None], "sampling": {"seed": None}}
    plain = in_words(
        asked, said | {"refused": [{"error": "x", "rows": 1}], "runs": [run_ | {"how": "x", "source": "x"}]}
    )
    assert len(in_words(asked, said).splitlines()) == len(plain.splitlines())


@pytest.mark.parametrize("values", [["one", "two", ""], ["", ""], ["", "one"]])
def test_errors_are_counted_with_the_rows_that_have_them(tmp_path: Path, values: list[str]) -> None:
    """A server reports these figures to clients; after the last rows there may be no further tick."""
    ticks: list[tuple[int, int]] = []
    run(tmp_path / "out", values, on_tick=lambda *counts: ticks.append(counts))
    bad = len(SPEC.questions) * values.count("")
    assert ticks[-1] == (len(SPEC.questions) * len(values), bad)
    assert all(rows - errors <= len(SPEC.questions) * len(values) - bad for rows, errors in ticks)
