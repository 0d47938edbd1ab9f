"""The pool gives no block to two sequences that do not share it, loses none, and keeps a sequence's blocks together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from distkv_dask.errors import CapacityError, PlanError
from distkv_dask.worker.blocks.pool import BlockShape, Pool

BLOCK = 4


def make_pool(blocks: int) -> Pool:
    return Pool(BlockShape(2, 2, 8, "float32", BLOCK), blocks)


class Bookkeeping(RuleBasedStateMachine):
    """Any order of reserving, growing, sharing and releasing, compared with a plain count."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = make_pool(20)
        self.blocks: dict[int, set[int]] = {sequence: set() for sequence in range(6)}

    @rule(sequence=st.integers(0, 5), first=st.integers(0, 10), tokens=st.integers(0, 40))
    def reserve(self, sequence: int, first: int, tokens: int) -> None:
        start, wanted = first * BLOCK, {*range(first, first + -(-tokens // BLOCK))}
        before = self.pool.table(sequence)
        if len(self.taken()) + len(wanted - self.blocks[sequence]) > 20:
            with pytest.raises(CapacityError, match="kv-memory"):
                self.pool.reserve(sequence, start, start + tokens)
            assert self.pool.table(sequence) == before
            return
        self.pool.reserve(sequence, start, start + tokens)
        self.blocks[sequence] |= wanted
        assert {*before} <= {*self.pool.table(sequence)}

    def taken(self) -> set[int]:
        return {block for sequence in range(6) for block in self.pool.table(sequence)}

    @rule(source=st.integers(0, 5), sequence=st.integers(0, 5), first=st.integers(0, 15), count=st.integers(0, 4))
    def share(self, source: int, sequence: int, first: int, count: int) -> None:
        wanted, span = {*range(first, first + count)}, (first * BLOCK, (first + count) * BLOCK)
        if not wanted <= self.blocks[source]:
            with pytest.raises(PlanError):
                self.pool.share(source, sequence, *span)
        elif not wanted & self.blocks[sequence]:
            self.pool.share(source, sequence, *span)
            self.blocks[sequence] |= wanted
            assert self.pool.find(sequence, [span]) == self.pool.find(source, [span])

    @rule(sequence=st.integers(0, 5), first=st.integers(0, 15), count=st.integers(0, 4))
    def free(self, sequence: int, first: int, count: int) -> None:
        self.pool.free(sequence, first * BLOCK, (first + count) * BLOCK)
        self.blocks[sequence] -= {*range(first, first + count)}

    @rule(sequence=st.integers(0, 5))
    def release(self, sequence: int) -> None:
        self.pool.release_sequence(sequence)
        self.blocks[sequence].clear()
        assert self.pool.table(sequence) == ()

    @invariant()
    def blocks_are_conserved_and_owned_once(self) -> None:
        tables = {sequence: self.pool.table(sequence) for sequence in range(6)}
        for sequence, table in tables.items():
            spans = [(at * BLOCK, (at + 1) * BLOCK) for at in sorted(self.blocks[sequence])]
            assert tuple(self.pool.find(sequence, spans)) == table
        assert len(self.taken()) == self.pool.used_blocks
        assert all(len(table) == len({*table}) for table in tables.values())
        assert self.taken() <= set(range(20))

    def teardown(self) -> None:
        for sequence in range(6):
            self.pool.release_sequence(sequence)
        assert self.pool.used_blocks == 0
        self.pool.reserve(99, 0, 20 * BLOCK)
        assert self.pool.table(99) == tuple(range(20))


TestBookkeeping = Bookkeeping.TestCase
TestBookkeeping.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_blocks_of_a_sequence_are_consecutive_when_any_run_is_long_enough() -> None:
    pool = make_pool(12)
    for sequence, blocks in enumerate((2, 3, 1, 4)):
        pool.reserve(sequence, 0, blocks * BLOCK)
    pool.release_sequence(1)
    pool.reserve(7, 0, 2 * BLOCK)
    assert pool.table(7) == (10, 11)  # the run that fits exactly, and leaves the longer one whole
    pool.reserve(8, 0, 3 * BLOCK)
    assert pool.table(8) == (2, 3, 4)


def test_a_growing_sequence_continues_behind_its_last_block() -> None:
    pool = make_pool(12)
    pool.reserve(1, 0, 2 * BLOCK)
    pool.reserve(1, 0, 5 * BLOCK)
    assert pool.table(1) == (0, 1, 2, 3, 4)


def test_scattered_blocks_are_used_when_no_run_is_long_enough() -> None:
    pool = make_pool(6)
    for sequence in range(6):
        pool.reserve(sequence, 0, BLOCK)
    for sequence in (0, 2, 3, 5):
        pool.release_sequence(sequence)
    pool.reserve(9, 0, 4 * BLOCK)
    assert sorted(pool.table(9)) == [0, 2, 3, 5]
    assert pool.table(9)[:2] == (2, 3)  # the longest run first


def test_one_block_is_one_contiguous_piece_of_memory_of_the_stated_size() -> None:
    block = BlockShape(3, 2, 8, "bfloat16", BLOCK)
    pool = Pool(block, 5)
    assert pool.storage[1].is_contiguous()
    assert pool.storage[1].nbytes == block.nbytes == 3 * 2 * 2 * 8 * BLOCK * 2


def test_written_keys_and_values_are_found_at_their_tokens_places() -> None:
    pool = make_pool(8)
    pool.reserve(1, 0, 3)
    pool.reserve(2, 0, 11)
    blocks, offsets = pool.slots(pool.table(2), 3, 10)
    keys, values = torch.randn(7, 2, 8), torch.randn(7, 2, 8)
    pool.write(1, (torch.tensor(blocks), torch.tensor(offsets)), keys, values)
    table = torch.tensor(pool.table(2))
    stored_keys = pool.keys(1)[table].transpose(1, 2).flatten(0, 1)
    stored_values = pool.values(1)[table].transpose(1, 2).flatten(0, 1)
    assert torch.equal(stored_keys[3:10], keys)
    assert torch.equal(stored_values[3:10], values)
    assert stored_keys[:3].abs().sum() == stored_keys[10:].abs().sum() == 0
    assert pool.keys(0).abs().sum() == 0


def test_tokens_that_are_not_here_or_lie_across_a_blocks_border_are_never_read() -> None:
    pool = make_pool(8)
    pool.reserve(1, 0, 2 * BLOCK)
    pool.reserve(1, 4 * BLOCK, 6 * BLOCK)
    assert pool.find(1, [(0, 2 * BLOCK), (4 * BLOCK, 5 * BLOCK + 1)]) == list(pool.table(1))
    for spans in ([(0, 3 * BLOCK)], [(1, BLOCK)], [(0, BLOCK + 1), (4 * BLOCK, 6 * BLOCK)], [(9 * BLOCK, 10 * BLOCK)]):
        with pytest.raises(PlanError, match="fault of the plan"):
            pool.find(1, spans)
