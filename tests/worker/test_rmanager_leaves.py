"""A worker whose card fails, or that leaves: its engines are reported once, and before its work fails."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from _managed import ADDRESS
from _managed_engines import Worker, worker

from distkv_dask.errors import ChannelError, DeviceMemoryError
from distkv_dask.messages.from_worker import GangFailed, Lost, Relocated
from distkv_dask.worker import rmanager

# Cards


@worker
async def test_the_third_failure_in_a_row_for_want_of_memory_gives_up_all_engines(made: Worker) -> None:
    made.open("a", "b")
    await made.idle()
    short = GangFailed(ADDRESS, 1, DeviceMemoryError("no memory"))
    for _ in range(3):
        made.manager.tell("a", short)
    await made.idle()
    assert made.kinds[2:] == [("a", "GangFailed")] * 2 + [("a", "Lost"), ("b", "Lost")]
    assert "ran out of memory" in made.told[-1][1].reason
    assert made.order == ["b closed, lanes open", "a closed, lanes open"]
    assert made.made[0].closed
    assert made.manager.lanes is None


@worker
async def test_other_failures_are_passed_on_as_often_as_they_come(made: Worker) -> None:
    made.open("a")
    await made.idle()
    for _ in range(9):
        made.manager.tell("a", GangFailed(ADDRESS, 1, ChannelError("gone")))
    await made.idle()
    assert made.kinds[1:] == [("a", "GangFailed")] * 9


@pytest.mark.parametrize("message", [Relocated(ADDRESS, 1), GangFailed(ADDRESS, 1, ChannelError("gone"))], ids=repr)
def test_a_worker_whose_card_failed_says_so_once_and_ends(message: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[tuple[Any, ...]] = []

    async def end(*given: Any) -> None:
        ends.append(given)

    monkeypatch.setattr(rmanager, "end_process", end)

    @worker
    async def test(made: Worker) -> None:
        made.open("a", "b")
        await made.idle()
        made.built[1].spec.config.timeout_close = 9.5
        made.built[0].device.lost = "H200 failed: Xid 79"
        made.manager.tell("a", message)
        made.manager.tell("a", message)
        await made.idle()
        assert made.told[2:] == [(name, Lost(ADDRESS, "H200 failed: Xid 79")) for name in ("a", "b")]
        assert ends == [(made.worker, "H200 failed: Xid 79", 9.5)]
        made.manager._lane_ended("a fault")
        made.open("c")
        await made.idle()
        assert len(made.told) == 4, "who leaves opens nothing and loses nothing else"

    test()


# The worker leaves


@worker
async def test_a_worker_that_leaves_says_so_before_its_work_fails(made: Worker) -> None:
    made.open("a", "b")
    await made.idle()
    close = made.built[0].close

    def end() -> None:
        made.manager.tell("a", GangFailed(ADDRESS, 1, ChannelError("its lanes are closed")))
        close()

    made.built[0].close = end  # type: ignore[method-assign]
    await made.manager.teardown(made.worker)
    await made.idle()
    assert made.kinds[2:5] == [("a", "Closed"), ("b", "Closed"), ("a", "GangFailed")]
    assert [one.closed for one in made.built] == [1, 1]
    assert made.made[0].closed
    assert (made.worker.handlers, made.worker.stream_handlers) == ({}, {})


@worker
async def test_nothing_is_opened_on_a_worker_that_leaves(made: Worker) -> None:
    await made.manager.teardown(made.worker)
    made.open("a")
    await made.idle()
    assert made.told == []
    assert not made.built


@worker
async def test_a_worker_that_leaves_waits_for_an_engine_that_opens(made: Worker) -> None:
    made.open("a")
    await asyncio.sleep(0)
    await made.manager.teardown(made.worker)
    await made.idle()
    assert [one.closed for one in made.built] == [1]
    assert not made.manager.engines
