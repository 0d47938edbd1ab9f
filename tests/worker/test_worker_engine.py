"""An engine on a worker: its messages about sequences and moves to the gManager, and their order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from _open_engine import W1, WINDOW, Open, given_or_raised

from distkv_dask.errors import CapacityError, ChannelError, DeviceLostError
from distkv_dask.messages import from_worker as did
from distkv_dask.messages.names import Piece, Transfer
from distkv_dask.placement import Span

MOVE = Transfer("move", 1)


@pytest.fixture
def made() -> Open:
    return Open()


# Sequences


def test_who_retires_is_answered_when_both_lanes_have_let_go(made: Open) -> None:
    home, holder = made.runtime.lanes.home, made.runtime.lanes.holder
    home.at_once = False
    made.join()
    later = home.submit(lambda: made.told.append("a window that waits"))  # type: ignore[func-returns-value]
    made.engine.retire(5)
    assert made.engine.is_retired(5)
    assert made.engine._batch.needs() == []
    assert holder.retiring == [], "the home lane may still compute on it"
    home.work()
    assert later.done()
    assert made.told == ["a window that waits"]
    ((engine, sequence, gone),) = holder.retiring
    assert (engine, sequence) == ("engine", 5)
    gone.set_result(None)
    assert made.told[1:] == [did.Retired("w0", 5)]


@pytest.mark.parametrize(
    "again",
    [
        lambda made: made.engine.reserve(5, 0, 8),
        lambda made: made.engine.release_sequence(5),
        lambda made: made.engine.free(5, 0, 8),
        lambda made: made.join(5),
    ],
    ids=["reserve", "release", "free", "join"],
)
def test_work_on_a_retired_sequence_may_start_again_when_it_is_asked_for(
    made: Open, again: Callable[[Open], None]
) -> None:
    made.engine.retire(5)
    made.engine.retire(6)
    again(made)
    assert not made.engine.is_retired(5)
    assert made.engine.is_retired(6)


def test_a_released_sequence_has_no_blocks_no_window_and_no_pieces(made: Open) -> None:
    made.join()
    made.engine.reserve(5, 0, 16)
    made.engine.expect(MOVE, 5, 16, 32)
    assert made.runtime.pool.used_blocks == 4
    made.engine.release_sequence(5)
    assert made.runtime.pool.used_blocks == 0
    assert made.engine._batch.needs() == []
    assert "move 1 is not expected" in made.engine.store_piece(Piece(MOVE, 0, 0, True), np.zeros(4, np.uint8))


def test_a_new_placement_is_told_behind_windows_that_use_the_old_one(made: Open) -> None:
    home = made.runtime.lanes.home
    home.at_once = False
    made.join()
    home.submit(lambda: made.told.append("a window"))  # type: ignore[func-returns-value]
    placement = (Span("w2", 0, 8), Span("w0", 8, 64))
    made.engine.relocate(3, 5, placement, (W1,))
    (now,), holders = made.engine._batch.of_window(WINDOW)
    assert (now.placement, holders) == (placement, (W1,))
    assert made.told == []
    home.work()
    assert made.told == ["a window", did.Relocated("w0", 3)]


# Moves


def test_a_move_is_expected_where_there_is_room(made: Open) -> None:
    made.engine.expect(MOVE, 5, 0, 32)
    made.engine.expect(Transfer("move", 2), 6, 0, 64)
    first, second = made.told
    assert first == did.Expected("w0", MOVE)
    assert isinstance(second, did.Expected)
    assert (second.transfer, "raise distkv.kv-memory" in second.refusal) == (Transfer("move", 2), True)
    assert made.runtime.pool.table(6) == ()


def test_blocks_that_are_freed_take_no_pieces(made: Open) -> None:
    made.engine.expect(MOVE, 5, 0, 16)
    assert made.engine.store_piece(Piece(MOVE, 0, 0, False), np.full(4, 7, np.uint8)) == ""
    made.engine.free(5, 8, 16)
    assert "move 1 is not expected" in made.engine.store_piece(Piece(MOVE, 1, 0, True), np.zeros(4, np.uint8))
    assert len(made.runtime.pool.table(5)) == 1


def test_a_failed_card_is_told_where_a_piece_cannot_be_stored(made: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: Any) -> None:
        raise DeviceLostError("the card failed")

    made.engine.expect(MOVE, 5, 0, 8)
    made.told.clear()
    monkeypatch.setattr(made.runtime.pool, "fill", lost)
    assert made.engine.store_piece(Piece(MOVE, 0, 0, True), np.zeros(4, np.uint8)) == "the card failed"
    assert made.told == [did.Expected("w0", MOVE, "the card failed")]


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        ("", ""),
        ("engine is not open", "engine is not open"),
        (OSError("no route"), "OSError: no route"),
        (TimeoutError(), "TimeoutError: no answer in time"),
        (ChannelError("cut off"), "cut off"),
    ],
)
def test_what_became_of_a_copy_is_told(made: Open, answer: Any, failure: str) -> None:
    async def peer(piece: Piece, data: np.ndarray) -> str:
        pieces.append(piece)
        return given_or_raised(answer)  # type: ignore[no-any-return]

    pieces: list[Piece] = []
    made.engine.reserve(5, 0, 16)
    asyncio.run(made.engine.send(peer, Transfer("move", 9), 5, range(0, 16), 0.0))
    assert made.told == [did.Sent("w0", Transfer("move", 9), failure)]
    assert [(one.block, one.last) for one in pieces] == ([(0, False)] if failure else [(0, False), (1, True)])


def test_a_copy_of_blocks_that_are_not_here_fails_as_a_whole(made: Open) -> None:
    made.engine.reserve(5, 0, 8)

    async def peer(*_: Any) -> str:
        raise AssertionError("nothing is sent")

    asyncio.run(made.engine.send(peer, Transfer("move", 9), 5, range(0, 16), 0.0))
    (told,) = made.told
    assert isinstance(told, did.Sent)
    assert "fault of the plan" in told.failure


def test_a_full_pool_is_the_message_loops_to_log(made: Open) -> None:
    with pytest.raises(CapacityError, match=r"distkv\.kv-memory"):
        made.engine.reserve(5, 0, 1000)
