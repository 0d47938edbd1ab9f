"""A worker's process ends at once when its exit handlers have run, before its nanny loses patience."""

from __future__ import annotations

import subprocess
import sys

import pytest
from _managed_engines import Worker, worker
from distributed.core import Status

from distkv_dask.worker import rmanager

PROGRAM = """
import atexit
from distkv_dask.worker.exit import end_without_collection

class Last:
    def __del__(self):
        print("objects")

kept = Last()
atexit.register(print, "first handler")
atexit.register(print, "last handler")
end_without_collection()
end_without_collection()
"""


def test_handlers_run_and_nothing_is_collected_after_them() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "last handler\nfirst handler\n"


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
