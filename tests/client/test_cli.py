"""The command line: help that needs no cluster, one line for each mistake, and the answers of plain requests."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from distributed import Client, LocalCluster

from distkv_dask import Engine, SamplingParams
from distkv_dask.client.cli import COMMANDS, main
from tests._models import text_model_dir


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    assert command in call("--help").output
    shown = call(command, "--help")
    assert shown.exit_code == 0
    assert "Usage: " in shown.output


def test_a_wrong_command_line_is_status_2_and_a_job_that_cannot_be_done_status_1(tmp_path: Path) -> None:
    for arguments, status, words in [
        (["run", tmp_path], 2, "--out"),
        (["run", tmp_path, "--out", tmp_path, "--too-long", "no"], 2, "truncate-head"),
        (["walk"], 2, "No such command"),
        (["status"], 2, "--scheduler"),
        (["run", tmp_path, "--out", tmp_path, "--scheduler", "tcp://x:1", "--workers", 2], 2, "the command starts"),
        (["ask", "Who?", "--max-new-tokens", 0], 1, "max_new_tokens"),
        (["ask", "Who?", "--engine", "auto"], 2, "--scheduler"),
        (["ask", "Who?", "--engine", "auto", "--scheduler", "tcp://x:1", "--model", "m"], 2, "names an open one"),
    ]:
        done = call(*arguments)
        assert (done.exit_code, words in done.output) == (status, True), (arguments, done.output)
        assert "Traceback" not in done.output


@pytest.mark.slow
def test_a_folder_and_a_parquet_file_give_the_answers_of_generate(tmp_path: Path) -> None:
    texts = [f"Report {number}: {'profits rose. ' * number}" for number in range(20)]
    (tmp_path / "docs").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "docs" / f"{number:02}.txt").write_text(text)
    pq.write_table(pa.table({"text": [*texts, None]}), tmp_path / "table.parquet")
    model = ["--model", text_model_dir(), "--dtype", "float32", "--kv-memory", "8 MiB"]
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
        Engine(client, str(text_model_dir()), dtype="float32", kv_memory="8 MiB") as engine,
    ):
        common = [*model, "--max-new-tokens", 6, "--scheduler", cluster.scheduler_address]
        prompts = [[{"role": "user", "content": f"{text}\n\nWho?"}] for text in texts]
        expected = [one.text for one in engine.generate(prompts, SamplingParams(max_new_tokens=6))]

        done = call("run", tmp_path / "docs", "-q", "Who?", "-o", tmp_path / "a", *common)
        assert done.exit_code == 0, done.output
        assert pq.read_table(tmp_path / "a").sort_by("path")["answer"].to_pylist() == expected
        done = call("run", tmp_path / "table.parquet", "-q", "Who?", "-o", tmp_path / "b", *common)
        assert (done.exit_code, "1 with errors" in done.output) == (3, True), done.output
        assert pq.read_table(tmp_path / "b").sort_by("row")["answer"].to_pylist() == [*expected, None]
        done = call("run", tmp_path / "docs", "-q", "Why?", "-o", tmp_path / "a", *common)
        assert (done.exit_code, "started with other parameters" in done.output) == (1, True), done.output

        done = call("ask", "Who?", tmp_path / "docs" / "03.txt", *common)
        assert (done.exit_code, done.output) == (0, expected[3] + "\n")
        for name in (engine.id, "auto"):
            attached = ["--max-new-tokens", 6, "--scheduler", cluster.scheduler_address, "--engine", name]
            done = call("ask", "Who?", tmp_path / "docs" / "03.txt", *attached)
            assert (done.exit_code, done.output) == (0, expected[3] + "\n")
        saving = [*model, "--scheduler", cluster.scheduler_address]
        done = call("ingest", tmp_path / "docs" / "03.txt", tmp_path / "saved", *saving)
        assert (done.exit_code, "tokens saved" in done.output) == (0, True), done.output
        done = call("ask", "Who?", tmp_path / "saved", *common)
        assert (done.exit_code, done.output) == (0, expected[3] + "\n")
        done = call("status", "--scheduler", cluster.scheduler_address)
        assert engine.id in done.output, done.output
        found = json.loads(call("status", "--json", "--scheduler", cluster.scheduler_address).output)
        assert found[engine.id]["totals"]["finished_length"] == 22
        assert list(found[engine.id]) == ["model", "dtype", "client", *engine.status().as_dict()]
