"""A dry run predicts a run: the same tokens, the same refusals, and a time that follows from both."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from distributed import Client, LocalCluster
from hypothesis import given
from hypothesis import strategies as st

from distkv_dask import Engine, SamplingParams
from distkv_dask.client.batch.estimate import FEW, NAMED
from distkv_dask.client.batch.needs import Need
from distkv_dask.client.batch.pace import Means, pace_of
from distkv_dask.client.cli import main
from distkv_dask.messages.status import WorkerPerformance
from tests._models import text_model_dir

SPEED = WorkerPerformance(0.05, 0.002, 1e-6, 0.001, 1e-6, measured=True, slower=1.0)


def means(workers: int = 1, kv_tokens: int = 100_000, batch: int = 4, exchange: float = 0.0) -> Means:
    return Means((SPEED,) * workers, kv_tokens, batch, exchange, "a test")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as client,
        Engine(client, str(text_model_dir()), dtype="float32", kv_memory="8 MiB", block_tokens=8) as opened,
    ):
        yield opened


def test_a_dry_run_counts_what_a_run_then_asks_and_refuses(engine: Engine, tmp_path: Path) -> None:
    texts = ["a word", "", "  ", "w" * 300, "x" * 3000, None, "y" * 5000, "z"]
    table = pa.table({"text": texts})
    asked = {"questions": ["Who?", "Where was it?"], "sampling": SamplingParams(max_new_tokens=8)}
    found = engine.estimate(table, **asked)
    engine.process(table, out=tmp_path / "out", progress=False, **asked)
    ran = pq.read_table(tmp_path / "out").to_pylist()
    refused = {(one["row"], one["question"]) for one in ran if one["error"] is not None}
    assert {(one.label, one.question) for one in found.refused_rows} == refused
    assert (found.rows, found.refused, found.requests) == (8, len(refused), 16 - len(refused))
    assert found.prompt_tokens == sum(one["prompt_tokens"] for one in ran if one["error"] is None)
    assert found.new_tokens == sum(one["new_tokens"] for one in ran if one["error"] is None)
    assert 0 < found.shared_tokens <= sum(one["reused_tokens"] for one in ran if one["error"] is None)
    assert found.seconds > 0 == engine.estimate(pa.table({"text": ["", None]}), question="Who?").seconds
    reasons = {one.error for one in found.refused_rows}
    assert {one["error"] for one in ran if one["error"] is not None} >= {
        one for one in reasons if "room for" not in one
    }


def test_a_bar_that_somebody_sees_tells_the_time_left(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts").mkdir()
    for at in range(6):
        (tmp_path / "texts" / f"{at}.txt").write_text("word " * (1 + 20 * at))
    few = SamplingParams(max_new_tokens=20)
    engine.process(tmp_path / "texts", question="Who?", sampling=few, out=tmp_path / "out", progress=True, in_flight=1)
    assert "6/6" in capsys.readouterr().err


@pytest.mark.parametrize("drawn", [{"n": 3, "temperature": 1.0}, {"choices": ("Yes", "No way")}], ids=str)
def test_several_answers_and_choices_are_counted_as_they_are_drawn(
    engine: Engine, tmp_path: Path, drawn: dict[str, Any]
) -> None:
    table = pa.table({"text": ["a word", "another word"]})
    asked = {"question": "Who?", "sampling": SamplingParams(max_new_tokens=8, **drawn)}
    found = engine.estimate(table, **asked)
    assert (found.refused, found.new_tokens) == (0, 48 if "n" in drawn else 2 * len(b"No way"))
    prompts = [
        engine.estimate(pa.table({"text": [text]}), question="Who?").prompt_tokens for text in table["text"].to_pylist()
    ]
    assert found.prompt_tokens == sum(prompts)


def test_parts_of_long_documents_are_counted_with_what_combines_them(engine: Engine, tmp_path: Path) -> None:
    table, window = pa.table({"text": ["w" * 9000]}), engine.facts.max_positions
    asked = {"question": "Who?", "too_long": "map-reduce", "sampling": SamplingParams(max_new_tokens=16)}
    found = engine.estimate(table, **asked)
    assert (found.refused, found.requests) == (0, 4)
    assert 9000 < found.prompt_tokens < 9000 + window


def test_many_rows_are_counted_by_workers_and_the_figures_are_the_same(engine: Engine, tmp_path: Path) -> None:
    texts = [f"{at} " * (at % 9) for at in range(3 * FEW)]
    whole = engine.estimate(pa.table({"text": texts}), question="Who?")
    parts = [engine.estimate(pa.table({"text": texts[at::3]}), question="Who?") for at in range(3)]
    for name in ("rows", "requests", "refused", "prompt_tokens", "new_tokens"):
        assert getattr(whole, name) == sum(getattr(one, name) for one in parts), name
    assert len(whole.refused_rows) == min(NAMED, whole.refused)


def test_the_command_prints_a_table_or_json_and_needs_no_cluster_with_a_preset(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for at in range(3):
        (tmp_path / "texts" / f"{at}.txt").write_text("word " * at)
    command = ["run", str(tmp_path / "texts"), "-q", "Who?", "--model", str(text_model_dir()), "--dry-run"]
    without = CliRunner(env={"DASK_SCHEDULER_ADDRESS": "", "COLUMNS": "120"})
    done = without.invoke(main, [*command, "--preset", "cpu-smollm2", "--workers", "4", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["rows"], found["requests"], found["refused"], found["workers"]) == (3, 2, 1, 4)
    assert (found["refused_rows"][0]["label"], found["basis"]) == ("0.txt", "the preset cpu-smollm2")
    shown = without.invoke(main, [*command, "--preset", "cpu-smollm2"]).output
    assert "the text is empty" in shown
    assert not (tmp_path / "answers").exists()
    for wrong in ([*command[:-1], "--out", str(tmp_path / "o"), "--preset", "cpu-smollm2"], command[:-1]):
        assert without.invoke(main, wrong).exit_code == 2


def test_prefill_and_decode_are_those_of_the_performance_model() -> None:
    one = Need(0, None, (1000,), new=10)
    pace = pace_of([one], means())
    assert pace.prefill == pytest.approx(1000 * 0.001 + 1000 * 500 * 1e-6)
    assert pace.decode == pytest.approx(10 * (0.05 + 0.002 + 1005 * 1e-6))
    assert pace.seconds == pytest.approx(pace.prefill + pace.decode)


def test_a_shared_document_is_computed_once_and_what_follows_attends_to_it() -> None:
    asked = [Need(0, "a", (1010,), 1000, 1000, 5), Need(0, "b", (1020,), 1000, 0, 5)]
    pace = pace_of(asked, means())
    document, rest = 1000 + 1000 * 500e-3, 10 + 10 * 1005e-3 + 20 + 20 * 1010e-3
    assert pace.prefill == pytest.approx((document + rest) * 1e-3)


def test_answers_to_one_prompt_are_decoded_each_and_computed_once() -> None:
    one, four = (pace_of([Need(0, None, (1000,), new=10, answers=count)], means()) for count in (1, 4))
    assert four.prefill == one.prefill
    assert four.decode == pytest.approx(10 * (0.05 + 4 * (0.002 + 1005 * 1e-6)))


def test_requests_that_decode_together_share_their_steps() -> None:
    asked = [Need(at, None, (8,), new=100) for at in range(8)]
    steps = [pace_of(asked, means(batch=batch)).decode for batch in (1, 4, 8)]
    rows = 8 * 100 * (0.002 + 58e-6)
    assert steps == pytest.approx([800 * 0.05 + rows, 200 * 0.05 + rows, 100 * 0.05 + rows])
    small = pace_of(asked, means(kv_tokens=2 * 108, batch=8)).decode
    assert small == pytest.approx(400 * 0.05 + rows)


NEEDS = st.lists(
    st.builds(lambda tokens, new: Need(0, None, (tokens,), new=new), st.integers(1, 3000), st.integers(1, 200)),
    min_size=1, max_size=30,
)  # fmt: skip


@given(NEEDS, st.integers(1, 5))
def test_more_work_never_takes_less_and_workers_share_it(needs: list[Need], workers: int) -> None:
    alone, shared = pace_of(needs, means()), pace_of(needs, means(workers))
    assert alone.seconds == pytest.approx(alone.prefill + alone.decode)
    assert shared.prefill == pytest.approx(alone.prefill)
    assert shared.seconds * workers >= shared.prefill + shared.decode - 1e-9
    more = pace_of([*needs, Need("more", None, (50,), new=5)], means())
    assert more.seconds > alone.seconds
