"""Blocks that move from pool to pool: all arrive, only in their places, and no faster than allowed."""

from __future__ import annotations

import asyncio
import random
import selectors
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import torch
from _examples import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from distkv_dask.errors import CapacityError, GangAbortedError, PlanError
from distkv_dask.messages.names import Piece, Transfer
from distkv_dask.worker.blocks.pool import BlockShape, Pool
from distkv_dask.worker.blocks.transfer import Arrivals, send_blocks

BLOCK, BLOCKS = 4, 16
SHAPE = BlockShape(2, 1, 2, "float32", BLOCK)


def run_on_a_clock_of_its_own(work: Callable[[], Awaitable[None]]) -> float:
    """Run a coroutine on a loop whose time passes only while it sleeps; returns the seconds that it took."""

    class Clock(selectors.DefaultSelector):
        now = 0.0

        def select(self, timeout: float | None = None) -> Any:
            self.now += timeout or 0.0
            return super().select(0)

    clock = Clock()
    loop = asyncio.SelectorEventLoop(clock)
    loop.time = lambda: clock.now  # type: ignore[method-assign]
    try:
        loop.run_until_complete(work())
    finally:
        loop.close()
    return clock.now


def filled(sequence: int, tokens: int, scattered: random.Random) -> Pool:
    """A pool with a sequence's blocks in random order, with random contents."""
    pool = Pool(SHAPE, BLOCKS)
    others = [*range(100, 100 + BLOCKS)]
    for other in others:
        pool.reserve(other, 0, 1)
    scattered.shuffle(others)
    for at in range(0, tokens, BLOCK):
        pool.release_sequence(others.pop())
        pool.reserve(sequence, at, at + BLOCK)
    pool.storage.copy_(torch.rand(pool.storage.shape))
    return pool


def content(pool: Pool, sequence: int) -> torch.Tensor:
    return pool.storage[list(pool.table(sequence))].clone()


@settings(max_examples=examples(60), deadline=None)
@given(
    blocks=st.integers(1, 6),
    first=st.integers(0, 5),
    per_step=st.integers(1, 9),
    pace=st.sampled_from([0.0, 0.25]),
    taking=st.sampled_from([0.0, 0.1, 3.0]),
    seed=st.integers(0, 9),
)
@example(blocks=3, first=0, per_step=4, pace=0.25, taking=0.0, seed=0)
@example(blocks=3, first=1, per_step=3, pace=0.25, taking=0.1, seed=0)
def test_a_move_brings_all_bytes_to_their_places_and_no_more_in_a_step_than_allowed(
    blocks: int, first: int, per_step: int, pace: float, taking: float, seed: int
) -> None:
    source = filled(7, (first + blocks) * BLOCK, random.Random(seed))
    target = Pool(SHAPE, BLOCKS)
    target.reserve(1, 0, 2 * BLOCK)
    arrivals, tokens = Arrivals(target), range(first * BLOCK, (first + blocks) * BLOCK)
    arrivals.expect(Transfer("move", 5), 7, tokens.start, tokens.stop)
    before = content(target, 1)
    begins: list[tuple[float, int]] = []
    lasts: list[bool] = []

    async def take(piece: Piece, data: np.ndarray) -> None:
        begins.append((asyncio.get_running_loop().time(), len(data)))
        lasts.append(piece.last)
        arrivals.store_piece(piece, np.array(data))
        await asyncio.sleep(taking)

    run_on_a_clock_of_its_own(lambda: send_blocks(source, Transfer("move", 5), 7, tokens, take, per_step, pace))
    assert torch.equal(content(target, 7), content(source, 7)[first:])
    assert torch.equal(content(target, 1), before)
    assert lasts == [False] * (len(lasts) - 1) + [True]
    with pytest.raises(GangAbortedError, match="not expected"):
        arrivals.store_piece(Piece(Transfer("move", 5), 0, 0, True), np.zeros(1, np.uint8))
    token_bytes = SHAPE.nbytes / BLOCK
    if pace:
        assert max(size for _, size in begins) <= per_step * token_bytes
        for at, (time, _) in enumerate(begins):
            in_a_step = [size for later, size in begins[at:] if later < time + pace * (1 - 1e-9)]
            assert sum(in_a_step) <= (per_step + min(per_step, BLOCK)) * token_bytes
        if not taking and len(begins) > 1:  # and no slower
            pieces = len(begins) - 1
            assert begins[-1][0] == pytest.approx(pieces * pace * min(per_step, BLOCK) / per_step)
    else:
        assert begins[-1][0] == pytest.approx(taking * (len(begins) - 1))


def test_blocks_that_are_not_there_are_not_sent() -> None:
    pool = Pool(SHAPE, BLOCKS)
    pool.reserve(7, 0, 2 * BLOCK)

    async def refuse(piece: Piece, data: np.ndarray) -> None:
        raise AssertionError("something was sent")

    with pytest.raises(PlanError):
        asyncio.run(send_blocks(pool, Transfer("move", 5), 7, range(0, 3 * BLOCK), refuse, 4, 0.0))


def test_a_move_that_finds_no_room_leaves_nothing_behind() -> None:
    pool = Pool(SHAPE, 3)
    pool.reserve(1, 0, 2 * BLOCK)
    arrivals = Arrivals(pool)
    with pytest.raises(CapacityError):
        arrivals.expect(Transfer("move", 5), 7, 0, 2 * BLOCK)
    assert pool.used_blocks == 2
    assert pool.table(7) == ()
    with pytest.raises(GangAbortedError):
        arrivals.store_piece(Piece(Transfer("move", 5), 0, 0, False), np.zeros(4, np.uint8))
    arrivals.expect(Transfer("move", 6), 7, 0, BLOCK)
    assert pool.used_blocks == 3


class Moving(RuleBasedStateMachine):
    """Moves of several sequences whose pieces arrive interleaved, and which may be given up at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool(SHAPE, BLOCKS)
        self.arrivals = Arrivals(self.pool)
        self.numbers = 0
        self.under_way: dict[int, tuple[int, int, list[tuple[Piece, np.ndarray]]]] = {}
        self.over: list[tuple[Piece, np.ndarray]] = []
        self.holds: dict[tuple[int, int], np.ndarray | None] = {}

    @rule(sequence=st.integers(0, 3), first=st.integers(0, 4), blocks=st.integers(1, 4), cut=st.integers(1, 3))
    def expect(self, sequence: int, first: int, blocks: int, cut: int) -> None:
        if any(one[0] == sequence for one in self.under_way.values()):
            return  # one move of a sequence at a time
        self.numbers += 1
        wanted = [(sequence, at) for at in range(first, first + blocks)]
        new = [one for one in wanted if one not in self.holds]
        tokens = first * BLOCK, (first + blocks) * BLOCK
        if len(self.holds) + len(new) > BLOCKS:
            with pytest.raises(CapacityError):
                self.arrivals.expect(Transfer("move", self.numbers), sequence, *tokens)
            return
        self.arrivals.expect(Transfer("move", self.numbers), sequence, *tokens)
        self.holds |= dict.fromkeys(new)
        size = SHAPE.nbytes
        step = -(-size // cut)
        rng = np.random.default_rng(self.numbers)
        pieces = [
            (
                Piece(Transfer("move", self.numbers), at, offset, at == blocks - 1 and offset + step >= size),
                rng.integers(0, 256, min(step, size - offset), np.uint8),
            )
            for at in range(blocks)
            for offset in range(0, size, step)
        ]
        self.under_way[self.numbers] = sequence, first, pieces

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), pieces=st.integers(1, 6))
    def take(self, data: st.DataObject, pieces: int) -> None:
        number = data.draw(st.sampled_from(sorted(self.under_way)))
        sequence, first, left = self.under_way[number]
        for piece, payload in left[:pieces]:
            self.arrivals.store_piece(piece, payload)
            before = self.holds[sequence, first + piece.block]
            whole = np.zeros(SHAPE.nbytes, np.uint8) if before is None else before.copy()
            if before is None and piece.offset:
                whole = self.bytes_of(sequence, first + piece.block)
            whole[piece.offset : piece.offset + len(payload)] = payload
            complete = piece.offset + len(payload) == SHAPE.nbytes or before is not None
            self.holds[sequence, first + piece.block] = whole if complete else None
            self.over.append((piece, payload))
        del left[:pieces]
        if not left:
            del self.under_way[number]

    @precondition(lambda self: self.over)
    @rule(data=st.data())
    def hear_again(self, data: st.DataObject) -> None:
        """Check that a piece of an ended move is written nowhere."""
        piece, payload = data.draw(st.sampled_from(self.over))
        if piece.transfer.number not in self.under_way:
            with pytest.raises(GangAbortedError, match="not expected"):
                self.arrivals.store_piece(piece, payload)

    @rule(sequence=st.integers(0, 3), first=st.integers(0, 6), blocks=st.integers(1, 6))
    def give_up(self, sequence: int, first: int, blocks: int) -> None:
        self.arrivals.drop(sequence)
        self.pool.free(sequence, first * BLOCK, (first + blocks) * BLOCK)
        self.forget(sequence, range(first, first + blocks))

    @rule(sequence=st.integers(0, 3))
    def release(self, sequence: int) -> None:
        self.arrivals.drop(sequence)
        self.pool.release_sequence(sequence)
        self.forget(sequence, range(99))

    def forget(self, sequence: int, gone: range) -> None:
        for number, (moving, _, left) in list(self.under_way.items()):
            if moving == sequence:
                self.over += left
                del self.under_way[number]
        for at in gone:
            self.holds.pop((sequence, at), None)

    def bytes_of(self, sequence: int, at: int) -> np.ndarray:
        (block,) = self.pool.find(sequence, [(at * BLOCK, (at + 1) * BLOCK)])
        return self.pool.storage[block].contiguous().view(-1).view(torch.uint8).numpy().copy()

    @invariant()
    def every_block_has_its_place_and_what_came_for_it(self) -> None:
        assert self.pool.used_blocks == len(self.holds)
        for (sequence, at), whole in self.holds.items():
            if whole is not None:
                assert (self.bytes_of(sequence, at) == whole).all()


TestMoving = Moving.TestCase
TestMoving.settings = settings(max_examples=examples(40), stateful_step_count=25, deadline=None)


@pytest.mark.parametrize("seed", range(examples(3)))
def test_moves_that_arrive_in_many_threads_while_others_are_given_up_land_in_their_own_blocks(seed: int) -> None:
    pool = Pool(SHAPE, 12)
    arrivals = Arrivals(pool)
    failures: list[BaseException] = []

    def live(mine: int) -> None:
        rng = random.Random(100 * seed + mine)
        try:
            for number in range(mine * 1000, mine * 1000 + 60):
                arrivals.expect(Transfer("move", number), mine, 0, 3 * BLOCK)  # there is room for all threads
                kept = rng.random() < 0.6
                for at in range(3 if kept else rng.randrange(3)):
                    data = np.full(SHAPE.nbytes, mine, np.uint8)
                    arrivals.store_piece(Piece(Transfer("move", number), at, 0, at == 2), data)
                if kept:
                    (found,) = {*pool.storage[list(pool.table(mine))].view(torch.uint8).unique().tolist()}
                    assert found == mine, "somebody wrote into its blocks"
                arrivals.drop(mine)
                pool.release_sequence(mine)
                with pytest.raises(GangAbortedError):
                    arrivals.store_piece(Piece(Transfer("move", number), 0, 0, False), np.zeros(4, np.uint8))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=live, args=(one,)) for one in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    assert pool.used_blocks == 0
