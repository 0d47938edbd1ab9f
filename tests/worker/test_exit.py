"""A worker's process ends as soon as its exit handlers have run, before its nanny's time limit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from _managed_engines import Worker, worker
from distributed.core import Status

from distkv_dask.worker import rmanager

PROGRAM = """
import atexit
import gc
import sys
from multiprocessing import get_context
from distkv_dask.worker.exit import end_without_collection

class Last:
    def __del__(self):
        print("objects")

def work(end):
    gc.set_threshold(10**9)  # only the last collection
    one = Last()
    one.itself = one
    del one
    atexit.register(print, "first handler")
    atexit.register(print, "last handler")
    end_without_collection()
    end_without_collection()
    exec(end)

if __name__ == "__main__":
    process = get_context("spawn").Process(target=work, args=(sys.argv[1],))
    process.start()
    process.join()
    print(process.exitcode)
"""
"""A process like those that nannies start, which ends in some way."""


def ended(folder: Path, end: str) -> tuple[str, str]:
    """Output, exit status and errors of such a process."""
    (folder / "program.py").write_text(PROGRAM)
    command = [sys.executable, folder / "program.py", end]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, done.stderr


def test_handlers_run_and_nothing_is_collected_after_them(tmp_path: Path) -> None:
    assert ended(tmp_path, "pass") == ("last handler\nfirst handler\n0\n", "")


@pytest.mark.parametrize(("end", "status", "error"), [("sys.exit(3)", 3, ""), ("1 / 0", 1, "ZeroDivisionError")])
def test_a_process_that_fails_at_its_end_has_its_own_exit_status(
    end: str, status: int, error: str, tmp_path: Path
) -> None:
    out, errors = ended(tmp_path, end)
    assert out == f"last handler\nfirst handler\nobjects\n{status}\n"
    assert error in errors


@pytest.mark.parametrize(
    ("nanny", "status", "ends"),
    [("tcp://nanny", Status.closing, 1), (None, Status.closing, 0), ("tcp://nanny", Status.running, 0)],
)
def test_only_a_worker_that_closes_under_a_nanny_ends_its_process(
    nanny: str | None, status: Status, ends: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []
    monkeypatch.setattr(rmanager, "end_without_collection", lambda: ended.append("ends"))

    async def test(made: Worker) -> None:
        made.worker.nanny, made.worker.status = nanny, status
        await made.manager.teardown(made.worker)

    worker(test)()
    assert len(ended) == ends
