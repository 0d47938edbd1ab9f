"""Engines open, close and are lost on a worker in any order, and each end is reported to the gManager once."""

from __future__ import annotations

import asyncio

import pytest
from _managed import ADDRESS
from _managed_engines import Worker, worker

from distkv_dask.errors import CapacityError, ConfigError, EngineClosedError, ModelError
from distkv_dask.messages.from_worker import Lost


@worker
async def test_an_engine_is_opened_once_however_often_it_is_asked_for(made: Worker) -> None:
    made.open("a", "a")
    await made.idle()
    made.open("a")
    await made.idle()
    assert made.kinds == [("a", "Facts")]
    assert len(made.built) == 1
    assert made.manager.engines == {"a": made.built[0]}


@worker
async def test_lanes_are_shared_and_end_with_the_last_engine(made: Worker) -> None:
    made.open("a", "b")
    await made.idle()
    (lanes,) = made.made
    made.close("a")
    await made.idle()
    assert not lanes.closed
    assert made.manager.lanes is lanes  # type: ignore[comparison-overlap]
    made.close("b")
    await made.idle()
    assert lanes.closed
    assert made.manager.lanes is None
    assert made.order == ["a closed, lanes open", "b closed, lanes open"]
    assert made.kinds[2:] == [("a", "Closed"), ("b", "Closed")]
    made.open("c")
    await made.idle()
    assert len(made.made) == 2, "closed lanes serve nobody"


@worker
async def test_closing_what_is_not_open_is_answered_too(made: Worker) -> None:
    made.close("a")
    await made.idle()
    assert made.kinds == [("a", "Closed")]


@worker
async def test_messages_of_opening_and_closing_are_done_in_their_order(made: Worker) -> None:
    made.open("a")
    made.close("a")
    made.open("a")
    await made.idle()
    assert made.kinds == [("a", "Facts"), ("a", "Closed"), ("a", "Facts")]
    assert [one.closed for one in made.built] == [1, 0]
    assert made.manager.engines == {"a": made.built[1]}


@worker
async def test_an_engine_that_does_not_close_well_is_told_as_closed(made: Worker) -> None:
    made.open("a")
    await made.idle()

    def broken() -> None:
        raise OSError("the disk is full")

    made.built[0].close = broken  # type: ignore[method-assign]
    made.close("a")
    (task,) = made.manager._tasks
    await made.idle()
    assert isinstance(task.exception(), OSError)
    assert made.kinds[1:] == [("a", "Closed")]
    assert not made.manager.engines


FAULTS = [
    (CapacityError("it needs 4 GiB"), "OpenFailed", CapacityError, "it needs 4 GiB"),
    (ConfigError("distkv.channel: odd"), "OpenFailed", ConfigError, "distkv.channel: odd"),
    (ValueError("a bug"), "OpenFailed", ModelError, f"{ADDRESS} could not open the engine: ValueError: a bug; see"),
    (EngineClosedError("a lane ended"), "Lost", None, "a lane ended"),
]


@pytest.mark.parametrize(("fault", "kind", "error", "words"), FAULTS, ids=lambda one: getattr(one, "__name__", None))
def test_an_engine_that_cannot_be_opened_is_told_with_the_reason(
    fault: Exception, kind: str, error: type[Exception] | None, words: str
) -> None:
    @worker
    async def test(made: Worker) -> None:
        made.faults["a"] = fault
        made.open("a")
        await made.idle()
        assert made.kinds == [("a", kind)]
        message = made.told[0][1]
        assert message.worker == ADDRESS
        if error is None:
            assert message.reason == words
        else:
            assert type(message.error) is error
            assert words in str(message.error)
            assert message.error.__traceback__ is None, "it would keep the model that was being loaded"
        assert not made.manager.engines
        assert made.manager.lanes is None
        assert [one.closed for one in made.made] == [True]

    test()


@worker
async def test_an_engine_that_cannot_be_opened_leaves_the_lanes_to_others(made: Worker) -> None:
    made.open("a")
    await made.idle()
    made.faults["b"] = CapacityError("no room")
    made.open("b")
    await made.idle()
    assert made.kinds == [("a", "Facts"), ("b", "OpenFailed")]
    assert not made.made[0].closed
    assert [*made.manager.engines] == ["a"]


# Lanes that end


@worker
async def test_engines_of_a_lane_that_ended_are_lost_and_can_be_opened_again(made: Worker) -> None:
    made.open("a", "b")
    await made.idle()
    first = made.made[0]
    first.closed = True  # it has ended by itself
    made.manager._lane_ended("its home lane ended: a fault")
    await made.idle()
    lost = made.told[2:]
    assert lost == [(name, Lost(ADDRESS, "its home lane ended: a fault")) for name in ("a", "b")]
    assert not made.manager.engines
    assert [one.closed for one in made.built] == [1, 1]
    made.open("a")
    await made.idle()
    assert len(made.made) == 2
    assert made.built[2].lanes is made.made[1]


@worker
async def test_a_lane_that_ends_while_an_engine_opens_loses_that_engine(made: Worker) -> None:
    def end() -> None:
        made.made[-1].closed = True
        made.manager._lane_ended("a fault")

    made.meanwhile = end
    made.open("a")
    await made.idle()
    assert made.kinds == [("a", "Facts"), ("a", "Lost")], "whoever hears of the loss must know the engine"
    assert "while it opened" in made.told[1][1].reason
    assert made.built[0].closed == 1
    assert not made.manager.engines


@worker
async def test_a_late_word_of_old_lanes_does_not_end_new_ones(made: Worker) -> None:
    made.open("a")
    await made.idle()
    made.manager._lane_ended("an older lane's")
    await made.idle()
    assert made.kinds == [("a", "Facts")]
    assert [*made.manager.engines] == ["a"]


@worker
async def test_closing_waits_until_a_lost_engine_is_gone(made: Worker) -> None:
    made.open("a")
    await made.idle()
    made.made[0].closed = True
    made.manager._lane_ended("a fault")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    made.close("a")
    await made.idle()
    assert made.kinds[1:] == [("a", "Lost"), ("a", "Closed")]
    assert made.built[0].closed == 1
    assert not made.manager._dropping
