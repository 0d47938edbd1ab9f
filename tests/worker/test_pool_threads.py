"""The pool with several threads: lanes write and read their own sequences while others are added, grow and end."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator

import pytest
from _examples import examples

from distkv_dask.errors import CapacityError, PlanError
from distkv_dask.worker.blocks.pool import BlockShape, Pool

BLOCK, BLOCKS, THREADS, ROUNDS = 4, 24, 4, 150


@pytest.fixture(autouse=True)
def threads_take_turns_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class Owner:
    """A thread with its own sequences: it stamps its blocks, and checks its stamps later."""

    def __init__(self, pool: Pool, number: int, seed: int) -> None:
        self.pool = pool
        self.sequences = [number * 10 + one for one in range(3)]
        self.rng = random.Random(seed * THREADS + number)
        self.stamped: dict[int, set[int]] = {sequence: set() for sequence in self.sequences}
        self.refusals = 0

    def live(self) -> None:
        for _ in range(ROUNDS):
            sequence = self.rng.choice(self.sequences)
            self.check(sequence)
            match self.rng.randrange(4):
                case 0:
                    self.pool.release_sequence(sequence)
                    self.stamped[sequence].clear()
                case 1:
                    first = self.rng.randrange(12)
                    self.pool.free(sequence, first * BLOCK, (first + 2) * BLOCK)
                    self.stamped[sequence] -= {first, first + 1}
                case _:
                    self.grow(sequence)
            self.check(sequence)
        for sequence in self.sequences:
            self.pool.release_sequence(sequence)

    def grow(self, sequence: int) -> None:
        first, count = self.rng.randrange(10), self.rng.randint(1, 4)
        before = self.pool.table(sequence)
        try:
            self.pool.reserve(sequence, first * BLOCK, (first + count) * BLOCK)
        except CapacityError:
            self.refusals += 1
            assert self.pool.table(sequence) == before, "a refusal changes nothing"
            return
        self.stamped[sequence] |= {*range(first, first + count)}
        for at in range(first, first + count):
            self.pool.storage[self.block(sequence, at)] = float(sequence)

    def block(self, sequence: int, at: int) -> int:
        (block,) = self.pool.find(sequence, [(at * BLOCK, (at + 1) * BLOCK)])
        return block

    def check(self, sequence: int) -> None:
        blocks = [self.block(sequence, at) for at in sorted(self.stamped[sequence])]
        assert tuple(blocks) == self.pool.table(sequence)
        assert bool((self.pool.storage[blocks] == float(sequence)).all()), "somebody wrote into its blocks"
        with pytest.raises(PlanError):
            self.pool.find(sequence, [(50 * BLOCK, 51 * BLOCK)])


@pytest.mark.parametrize("seed", range(examples(4)))
def test_sequences_of_several_threads_never_share_a_block_and_none_is_lost(seed: int) -> None:
    pool = Pool(BlockShape(2, 2, 8, "float32", BLOCK), BLOCKS)
    owners = [Owner(pool, number, seed) for number in range(THREADS)]
    failures: list[BaseException] = []

    def work(owner: Owner) -> None:
        try:
            owner.live()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(owner,)) for owner in owners]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert 0 <= pool.used_blocks <= BLOCKS
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    assert sum(owner.refusals for owner in owners) > 0, "the pool was never full: this tried little"
    assert pool.used_blocks == 0
    pool.reserve(99, 0, BLOCKS * BLOCK)
    assert pool.table(99) == tuple(range(BLOCKS))


def test_many_quick_changes_at_once_leave_every_block_with_one_owner() -> None:
    pool = Pool(BlockShape(1, 1, 1, "float32", BLOCK), 64)
    failures: list[BaseException] = []
    together = threading.Barrier(THREADS, action=lambda: tables.append([*map(pool.table, range(THREADS))]))
    tables: list[list[tuple[int, ...]]] = []

    def work(sequence: int) -> None:
        rng = random.Random(sequence)
        try:
            for _ in range(20):
                for _ in range(300):
                    first = rng.randrange(14)
                    pool.reserve(sequence, first * BLOCK, (first + 2) * BLOCK)  # there is room for all of them
                    pool.free(sequence, rng.randrange(16) * BLOCK, 16 * BLOCK)
                together.wait(60)
        except BaseException as error:
            failures.append(error)
            together.abort()

    threads = [threading.Thread(target=work, args=(sequence,)) for sequence in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    for owned in tables:
        blocks = [block for table in owned for block in table]
        assert len(blocks) == len(set(blocks))
    for sequence in range(THREADS):
        pool.release_sequence(sequence)
    pool.reserve(99, 0, 64 * BLOCK)
    assert pool.table(99) == tuple(range(64))
