"""Clients, a worker and a scheduler killed in a batch: the same command again completes it, with every row once."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client

from distkv_dask import Engine, SamplingParams
from tests._forked_workers import Forked
from tests._models import text_model_dir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROWS, BAD, NEW = 40, {7, 23, 24, 35}, 60


def texts() -> list[str | None]:
    return [None if number in BAD else f"Report {number}: {'profits rose. ' * (number % 7)}" for number in range(ROWS)]


@contextmanager
def cluster(folder: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A scheduler and two workers with nannies, each a process; yields the scheduler's file and what kills it."""
    file = folder / f"scheduler-{time.monotonic_ns()}.json"
    local = ["--host", "127.0.0.1", "--no-dashboard", "--scheduler-file", str(file)]
    commands = [["scheduler", "--port", "0", *local], *[["worker", "--nthreads", "1", *local]] * 2]
    processes = [Forked("dask", *command) for command in commands]
    try:
        with Client(scheduler_file=str(file), timeout=60) as client:
            client.wait_for_workers(2, timeout=60)
        yield file, processes[0].kill
    finally:
        for process in processes[::-1]:
            process.terminate()  # nannies end their workers
        for process in processes:
            process.wait(60)


def begin(folder: Path, scheduler: Path) -> Forked:
    """Start the batch, with windows so short that it cannot end before something is killed."""
    options = ["--dtype", "float32", "--kv-memory", "8 MiB", "--max-new-tokens", str(NEW), "--in-flight", "4"]
    where = ["--model", str(text_model_dir()), "-o", str(folder / "out"), "-q", "Who?"]
    address = json.loads(scheduler.read_text())["address"]
    command = ["run", folder / "in.parquet", *options, *where, "--scheduler", address]
    environment = {"DASK_DISTKV__WINDOW__STEPS": "2", "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "5s"}
    return Forked("distkv_dask.client.cli", *command, environment=environment)


def answered(folder: Path) -> int:
    """Rows that a crash can no longer remove: those in Parquet files and in whole batches of a journal."""
    rows = 0
    for file in (folder / "out").glob("*"):
        try:
            if file.suffix == ".parquet" and not file.name.startswith("_"):
                rows += pq.read_metadata(file).num_rows
            elif file.name.startswith("_journal-"):
                with pa.ipc.open_stream(file.read_bytes()) as stream:
                    for batch in stream:
                        rows += batch.num_rows
        except (OSError, pa.ArrowException):  # renamed or written to at this moment
            continue
    return rows


def until_more(folder: Path, job: Forked, had: int) -> int:
    """Wait until the batch has answered more rows, and return how many there are now."""
    deadline = time.monotonic() + 90
    while (now := answered(folder)) < had + 3:
        assert job.poll() is None, "the batch ended before anything could be killed"
        assert time.monotonic() < deadline, f"no more rows than {had}"
        time.sleep(0.02)
    return now


def test_killed_clients_workers_and_schedulers_cost_no_row_and_double_none(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": texts()}), tmp_path / "in.parquet")
    done = [0]
    with cluster(tmp_path) as (scheduler, kill_scheduler):
        for kill in ("client", "client", "scheduler"):
            job = begin(tmp_path, scheduler)
            try:
                done.append(until_more(tmp_path, job, done[-1]))
                if kill == "scheduler":
                    kill_scheduler()
                    assert job.wait(60) == 1
            finally:
                job.kill()
                job.wait(30)
    with cluster(tmp_path) as (scheduler, _), Client(scheduler_file=str(scheduler)) as client:
        job = begin(tmp_path, scheduler)
        try:
            done.append(until_more(tmp_path, job, done[-1]))
            os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL)
            assert job.wait(180) == 3, "not the exit status of a batch in which some rows have errors"
        finally:
            job.kill()
            job.wait(30)
        assert done == sorted(set(done)), f"rows were lost: {done}"
        assert done[-1] < ROWS, "everything was answered before the worker was killed"
        found = pq.read_table(tmp_path / "out").sort_by("row").to_pylist()
        assert [one["row"] for one in found] == list(range(ROWS))
        assert {one["row"] for one in found if one["error"]} == BAD
        client.wait_for_workers(2, timeout=60)
        with Engine(client, str(text_model_dir()), dtype="float32", kv_memory="8 MiB") as engine:
            prompts = [[{"role": "user", "content": f"{text}\n\nWho?"}] for text in texts() if text is not None]
            expected = engine.generate(prompts, SamplingParams(max_new_tokens=NEW))
        assert [one["answer"] for one in found if not one["error"]] == [one.text for one in expected]
