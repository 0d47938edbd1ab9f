"""A worker whose card has too little memory gives up its engines after consecutive failures, not after a total."""

from __future__ import annotations

import pytest

from distkv_dask.errors import ChannelError, DeviceMemoryError
from distkv_dask.gang import Exchanged, WindowResult
from distkv_dask.messages.from_worker import ChunkDone, GangFailed, Prefilled, WindowDone
from distkv_dask.worker.shortages import Shortages

SHORT = GangFailed("w0", 1, DeviceMemoryError("no memory"))
DONE = [
    ChunkDone("w0", 0, 1, Exchanged()),
    Prefilled("w0", 0, 1, 7, None, Exchanged()),
    WindowDone("w0", 1, 1, WindowResult({}, {}, 1, 0.1), ()),
]


def test_the_third_in_a_row_is_too_many_and_counting_begins_again() -> None:
    counted = Shortages()
    assert [counted.are_too_many(SHORT) for _ in range(7)] == [False, False, True, False, False, True, False]


@pytest.mark.parametrize("done", DONE)
def test_what_is_computed_meanwhile_makes_up_for_those_before(done: ChunkDone | Prefilled | WindowDone) -> None:
    counted = Shortages()
    seen = [counted.are_too_many(one) for one in (SHORT, SHORT, done, SHORT, SHORT)]
    assert not any(seen)


def test_other_failures_do_not_count() -> None:
    counted = Shortages()
    seen = [counted.are_too_many(one) for one in [SHORT, SHORT, *[GangFailed("w0", 1, ChannelError("gone"))] * 9]]
    assert not any(seen)
