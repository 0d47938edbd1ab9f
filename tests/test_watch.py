"""Work that may hang is abandoned when it makes no progress, and changes nothing after that."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from distkv_dask.errors import SavedDocumentError
from distkv_dask.watch import Watch, watched


def test_work_that_goes_on_is_waited_for_longer_than_the_limit() -> None:
    def work(watch: Watch, steps: int) -> int:
        for _ in range(steps):
            time.sleep(0.05)
            watch.step()
        return steps

    assert asyncio.run(watched(0.5, "counting", work, 20)) == 20


def test_work_that_stands_still_ends_with_what_to_do_and_changes_nothing_afterwards() -> None:
    hanging, ended, changed = threading.Event(), threading.Event(), []

    def work(watch: Watch) -> None:
        watch.step()
        hanging.wait(20)
        try:
            with watch.change():
                changed.append(1)
        finally:
            ended.set()

    with pytest.raises(SavedDocumentError, match=r"reading x stood still for 0.2 s \(distkv.timeouts.files\)"):
        asyncio.run(watched(0.2, "reading x", work))
    hanging.set()
    assert ended.wait(20)
    assert not changed


def test_an_error_of_the_work_is_raised() -> None:
    def work(watch: Watch) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(watched(5.0, "dividing", work))
