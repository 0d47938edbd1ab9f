"""The ledger under any order of reservations, moves, drains, deaths and joins.

The model knows one thing: the worker of each block of each sequence. Everything that the ledger counts must follow from
that.
"""

from __future__ import annotations

import pytest
from _examples import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from distkv_dask.placement import Endpoint, Move, Placement, Span
from distkv_dask.scheduler.ledger.invariants import check_ledger
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.ledger.placements import shared

BLOCK = 16
NAMES = [f"w{number}" for number in range(5)]


def spans_of(blocks: list[str], tokens: int) -> Placement:
    """The placement of blocks on these workers, one after the other."""
    spans: list[Span] = []
    for number, worker in enumerate(blocks):
        start, stop = number * BLOCK, min((number + 1) * BLOCK, tokens)
        if spans and spans[-1].worker == worker:
            spans[-1] = Span(worker, spans[-1].start, stop)
        else:
            spans.append(Span(worker, start, stop))
    return tuple(spans)


class LedgerMachine(RuleBasedStateMachine):
    """Workers with fixed names that join and leave, sequences with blocks anywhere, moves with all kinds of ends."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(BLOCK, batch=4)
        self.blocks: dict[int, list[str]] = {}
        self.tokens: dict[int, int] = {}
        self.shared: dict[int, tuple[int, int]] = {}
        self.moves: list[Move] = []
        self.next = 0

    @rule(name=st.sampled_from(NAMES), capacity=st.integers(0, 12), limit=st.integers(0, 12), weights=st.booleans())
    def join(self, name: str, capacity: int, limit: int, weights: bool) -> None:
        if name not in self.ledger.workers:
            self.ledger.add_worker(Endpoint(name, "host", 1), capacity, lend_limit=limit, can_decode=weights)

    @precondition(lambda self: self.ledger.workers)
    @rule(data=st.data(), settle=st.booleans())
    def die(self, data: st.DataObject, settle: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.ledger.workers)))
        moves_to = [move for move in self.moves if move.target == name]
        accounts = self.ledger.sequences
        expected = [n for n, blocks in self.blocks.items() if name in blocks and name not in accounts[n].lost]
        lost = self.ledger.remove_worker(name)
        assert lost == sorted(expected)
        self.moves = [move for move in self.moves if move not in moves_to]
        for number in reversed(lost) if settle else ():  # sharers were added later
            if not self.ledger.sequences[number].sharers:
                self.forget(number)

    @precondition(lambda self: self.ledger.workers)
    @rule(data=st.data(), retiring=st.booleans())
    def drain(self, data: st.DataObject, retiring: bool) -> None:
        self.ledger.retire_worker(data.draw(st.sampled_from(sorted(self.ledger.workers))), retiring)

    @precondition(lambda self: self.ledger.workers)
    @rule(data=st.data(), tokens=st.integers(1, 10 * BLOCK))
    def reserve(self, data: st.DataObject, tokens: int) -> None:
        count = -(-tokens // BLOCK)
        names = st.sampled_from(sorted(self.ledger.workers))
        blocks = data.draw(st.lists(names, min_size=count, max_size=count))
        number, self.next = self.next, self.next + 1
        fits = all(self.ledger.workers[name].free >= blocks.count(name) for name in blocks)
        if not fits:
            with pytest.raises(ValueError, match="do not fit"):
                self.ledger.reserve(number, spans_of(blocks, tokens))
            return
        self.ledger.reserve(number, spans_of(blocks, tokens))
        self.ledger.commit(number, tokens)
        self.blocks[number], self.tokens[number] = blocks, tokens

    @precondition(lambda self: self.blocks and self.ledger.workers)
    @rule(data=st.data(), own=st.integers(1, 3 * BLOCK))
    def share(self, data: st.DataObject, own: int) -> None:
        """A sequence that begins with whole blocks of another one, or with blocks that the other one shares itself."""
        document = data.draw(st.sampled_from(sorted(self.blocks)))
        most = self.ledger.sequences[document].length // BLOCK
        if not most:
            return
        tokens = data.draw(st.integers(1, most)) * BLOCK
        prefix = shared(self.ledger.sequences[document].placement, document, tokens)
        name = data.draw(st.sampled_from(sorted(self.ledger.workers)))
        number, self.next = self.next, self.next + 1
        placement = (*prefix, Span(name, tokens, tokens + own))
        there = [self.ledger.sequences[span.document] for span in prefix if span.document is not None]
        whole = not any(account.moves or account.lost for account in there)
        if whole and self.ledger.workers[name].free >= -(-own // BLOCK):
            self.ledger.reserve(number, placement)
            self.ledger.commit(number, tokens + own)
            self.shared[number] = tokens, document
            self.blocks[number] = self.blocks[document][: tokens // BLOCK] + [name] * -(-own // BLOCK)
            self.tokens[number] = tokens + own
        elif whole:
            with pytest.raises(ValueError, match="do not fit"):
                self.ledger.reserve(number, placement)

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        """A sequence becomes a document of its first blocks."""
        number = data.draw(st.sampled_from(sorted(self.blocks)))
        account = self.ledger.sequences[number]
        most = account.length // BLOCK
        if account.moves or account.sharers or not most:
            with pytest.raises(ValueError, match="cannot be kept"):
                self.ledger.make_document(number, max(1, most) * BLOCK)
            return
        count = data.draw(st.integers(1, most))
        before = sum(worker.used for worker in self.ledger.workers.values())
        freed = self.ledger.make_document(number, count * BLOCK)
        gone = sum(self.ledger.blocks(span.tokens) for span in freed)
        assert sum(worker.used for worker in self.ledger.workers.values()) == before - gone
        self.blocks[number], self.tokens[number] = self.blocks[number][:count], count * BLOCK

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.blocks)))
        if self.ledger.sequences[number].sharers:
            with pytest.raises(ValueError, match="shared by"):
                self.ledger.release_sequence(number)
        else:
            self.forget(number)

    def forget(self, number: int) -> None:
        account = self.ledger.sequences[number]
        targets = {move.target for move in self.moves if move.sequence == number}
        there = {name for name in (*self.blocks.pop(number), *targets) if name not in account.lost}
        assert set(self.ledger.release_sequence(number)) == there
        self.moves = [move for move in self.moves if move.sequence != number]

    @precondition(lambda self: self.blocks and self.ledger.workers)
    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.blocks)))
        span = data.draw(st.sampled_from(self.ledger.sequences[number].placement))
        first = data.draw(st.integers(span.start // BLOCK, (span.stop - 1) // BLOCK))
        last = data.draw(st.integers(first + 1, -(-span.stop // BLOCK)))
        target = data.draw(st.sampled_from(sorted(self.ledger.workers)))
        move = Move(number, first * BLOCK, min(last * BLOCK, span.stop), span.worker, target)
        objection, used = self.ledger.objection(move), {n: a.used for n, a in self.ledger.workers.items()}
        if objection:
            with pytest.raises(ValueError, match="Move"):
                self.ledger.start_move(move)
            assert used == {n: a.used for n, a in self.ledger.workers.items()}
        else:
            self.ledger.start_move(move)
            self.moves.append(move)
            account = self.ledger.workers[target]
            assert account.used == used[target] + last - first
            lends = move.stop < self.tokens[number] and target != self.ledger.sequences[number].home
            assert not lends or account.lent <= account.lend_limit

    @precondition(lambda self: self.moves)
    @rule(data=st.data(), how=st.sampled_from(["finish", "finish", "cancel"]))
    def go_on(self, data: st.DataObject, how: str) -> None:
        move = data.draw(st.sampled_from(self.moves))
        if how == "finish" and move.source not in self.ledger.sequences[move.sequence].lost:
            epoch = self.ledger.epoch
            placement = self.ledger.finish_move(move)
            first, last = move.start // BLOCK, -(-move.stop // BLOCK)
            self.blocks[move.sequence][first:last] = [move.target] * (last - first)
            assert placement == self.ledger.sequences[move.sequence].placement
            assert self.ledger.epoch == epoch + 1
            self.moves.remove(move)
        else:
            self.ledger.cancel_move(move)
            self.moves.remove(move)

    @invariant()
    def everything_is_where_the_map_says(self) -> None:
        check_ledger(self.ledger)
        assert self.ledger.sequences.keys() == self.blocks.keys()
        assert set(self.ledger.moves) == set(self.moves)
        for number, account in self.ledger.sequences.items():
            own = self.shared.get(number, (0, 0))[0]
            lies = [
                (s.worker, block) for s in account.placement for block in range(s.start // BLOCK, -(-s.stop // BLOCK))
            ]
            assert lies == [(worker, block) for block, worker in enumerate(self.blocks[number])]
            assert all((span.document is None) == (span.start >= own) for span in account.placement)
            assert own or account.placement == spans_of(self.blocks[number], self.tokens[number])

    def teardown(self) -> None:
        for number in sorted(self.blocks, reverse=True):
            self.forget(number)
        check_ledger(self.ledger)
        assert not self.ledger.owes.by_pair()
        assert not self.ledger.moves
        assert all(a.used == a.lent == a.borrowed == a.homed == 0 for a in self.ledger.workers.values())


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=examples(60), stateful_step_count=30, deadline=None)
