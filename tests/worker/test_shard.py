"""A worker's part of a batch compared with float64 attention, step by step, for any rows, windows and soft caps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from _examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from distkv_dask.errors import PlanError
from distkv_dask.geometry import LayerKind
from distkv_dask.worker.blocks.pool import BlockShape, Pool
from distkv_dask.worker.by_layer.attention import Asked, attend_part
from distkv_dask.worker.channels.bodies import Row
from distkv_dask.worker.plan import Part
from distkv_dask.worker.shard import Shard
from distkv_dask.worker.tensor_message import TensorMessage

BLOCK, HEADS, KV_HEADS, DIM = 4, 4, 2, 16
SCALE = 0.3


@st.composite
def rows(draw: st.DrawFn, sequence: int, steps: int) -> Row:
    """A row over one or two spans with gaps, with room for the tokens of ``steps`` steps if it appends."""
    first = draw(st.integers(0, 2)) * BLOCK
    spans = [(first, first + draw(st.integers(1, 3)) * BLOCK)]
    if draw(st.booleans()):
        start = spans[0][1] + draw(st.integers(1, 2)) * BLOCK
        spans.append((start, start + draw(st.integers(1, 3)) * BLOCK))
    room = sum(stop - start for start, stop in spans)
    queries = draw(st.integers(1, 3))
    appends = draw(st.booleans()) and room >= steps * queries
    if appends:
        before = room - (spans[-1][1] - spans[-1][0])
        least = min(before, room - steps * queries)
        length = draw(st.integers(least, room - steps * queries))
        position = spans[-1][0] + length - before
    else:
        length = draw(st.integers(1, room))
        position = spans[-1][1] + draw(st.integers(0, 9))
    return Row(sequence, length, queries, appends, tuple(spans), (position,))


kinds = st.one_of(
    st.just(LayerKind()),
    st.builds(LayerKind, st.sampled_from(["sliding", "chunked"]), st.integers(1, 30), st.none() | st.floats(1.0, 30.0)),
    st.builds(LayerKind, st.just("full"), st.just(0), st.floats(1.0, 30.0)),
)


class Dense:
    """Keys and values of each sequence in plain arrays, by position."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self.stored: dict[tuple[int, int, int], tuple[np.ndarray, np.ndarray]] = {}

    def new(self, *shape: int) -> np.ndarray:
        return self._random.standard_normal(shape).astype(np.float32)

    def attend(
        self, layer: int, sequence: int, held: list[int], q: np.ndarray, position: int, kind: LayerKind
    ) -> tuple[np.ndarray, np.ndarray]:
        """One query over the held positions that it sees, in float64: [heads, dim] and [heads]."""
        seen = [at for at in held if at >= kind.first(position)]
        out, lse = np.zeros((HEADS, DIM)), np.full(HEADS, -np.inf)
        if not seen:
            return out, lse
        keys, values = (np.stack([self.stored[layer, sequence, at][one] for at in seen]) for one in (0, 1))
        for head in range(HEADS):
            own = head // (HEADS // KV_HEADS)
            scores = keys[:, own].astype(np.float64) @ q[head].astype(np.float64) * SCALE
            if kind.soft_cap is not None:
                scores = kind.soft_cap * np.tanh(scores / kind.soft_cap)
            most = scores.max()
            weights = np.exp(scores - most)
            lse[head] = most + math.log(weights.sum())
            out[head] = weights @ values[:, own].astype(np.float64) / weights.sum()
        return out, lse


def prepared(some: list[Row], layer_kinds: tuple[LayerKind, ...], dense: Dense) -> Pool:
    """A pool with the stored tokens of the rows, and the same in plain arrays."""
    pool = Pool(BlockShape(len(layer_kinds), KV_HEADS, DIM, "float32", BLOCK, layer_kinds), 40)
    for row in some:
        for start, stop in row.spans:
            pool.reserve(row.sequence, start, stop)
        table, held = pool.find(row.sequence, row.spans), positions(row)
        blocks, offsets = map(torch.tensor, pool.slots(table, 0, row.length))
        for layer in range(len(layer_kinds)):
            k, v = dense.new(row.length, KV_HEADS, DIM), dense.new(row.length, KV_HEADS, DIM)
            if row.length:
                pool.write(layer, (blocks, offsets), torch.from_numpy(k), torch.from_numpy(v))
            for at in range(row.length):
                dense.stored[layer, row.sequence, held[at]] = k[at], v[at]
    return pool


def positions(row: Row) -> list[int]:
    return [at for start, stop in row.spans for at in range(start, stop)]


@settings(max_examples=examples(60), deadline=None)
@given(st.data(), st.lists(kinds, min_size=1, max_size=3).map(tuple), st.integers(1, 3), st.integers(0, 99))
def test_steps_of_any_rows_are_exact(
    data: st.DataObject, layer_kinds: tuple[LayerKind, ...], steps: int, seed: int
) -> None:
    some = [data.draw(rows(sequence, steps)) for sequence in range(data.draw(st.integers(1, 4)))]
    dense = Dense(seed)
    shard = Shard(prepared(some, layer_kinds, dense), some, HEADS)
    assert shard.tokens == sum(row.queries for row in some)
    for step in range(steps):
        for layer in shard.asked:
            q = dense.new(shard.tokens, HEADS, DIM)
            k, v = dense.new(shard.appended, KV_HEADS, DIM), dense.new(shard.appended, KV_HEADS, DIM)
            shard.attend(layer, *map(torch.from_numpy, (q, k, v)), SCALE)
            check(some, layer_kinds[layer], dense, layer, step, (q, k, v), shard.out.numpy(), shard.lse.numpy())
        shard.advance()


def check(
    some: list[Row], kind: LayerKind, dense: Dense, layer: int, step: int, new: tuple[np.ndarray, ...],
    out: np.ndarray, lse: np.ndarray,
) -> None:  # fmt: skip
    """Results of one layer, query by query; appended tokens are also stored in the plain arrays."""
    q, k, v = new
    query = appended = 0
    for row in some:
        held, length = positions(row), row.length + step * row.queries * row.appends
        for at in range(row.queries):
            if row.appends:
                dense.stored[layer, row.sequence, held[length + at]] = k[appended], v[appended]
                appended += 1
            seen = held[: length + (at + 1) * row.appends]
            position = row.positions[0] + step * row.queries + at
            right = dense.attend(layer, row.sequence, seen, q[query], position, kind)
            np.testing.assert_allclose(out[query], right[0], atol=2e-4)
            np.testing.assert_allclose(lse[query], right[1], atol=2e-4)
            query += 1


@settings(max_examples=examples(40), deadline=None)
@given(st.data(), kinds, st.integers(0, 99))
def test_one_step_carried_by_a_task_is_the_same(data: st.DataObject, kind: LayerKind, seed: int) -> None:
    some = [data.draw(rows(sequence, 1)) for sequence in range(data.draw(st.integers(1, 3)))]
    dense = Dense(seed)
    pool, count = prepared(some, (kind,), dense), sum(row.queries for row in some)
    order = data.draw(st.permutations(range(count)))
    new = dense.new(count, HEADS, DIM), dense.new(count, KV_HEADS, DIM), dense.new(count, KV_HEADS, DIM)
    part = Part(tuple(some), tuple(order))
    question = TensorMessage(Asked(0, SCALE, {"w1": part}), tuple(map(torch.from_numpy, new)))
    out, lse = attend_part(pool, part, question)
    q, k, v = (one[list(order)] for one in new)  # a part's queries are in its own order
    appending = [at for at, row in enumerate(row for row in some for _ in range(row.queries)) if row.appends]
    check(some, kind, dense, 0, 0, (q, k[appending], v[appending]), out.numpy(), lse.numpy())


def test_a_row_without_room_is_a_fault_of_the_plan_of_its_sequence() -> None:
    pool = Pool(BlockShape(1, KV_HEADS, DIM, "float32", BLOCK), 8)
    pool.reserve(7, 0, 8)
    fits = Row(7, 6, 2, True, ((0, 8),), (6,))
    Shard(pool, [fits], HEADS)
    Shard(pool, [fits._replace(length=8, appends=False)], HEADS)
    for row in (fits._replace(length=7), fits._replace(queries=3), fits._replace(length=9, appends=False)):
        with pytest.raises(PlanError, match="sequence 7 has room for 8 tokens") as caught:
            Shard(pool, [row], HEADS)
        assert caught.value.sequence == 7


def test_steps_beyond_the_room_are_refused_before_they_write() -> None:
    pool = Pool(BlockShape(1, KV_HEADS, DIM, "float32", BLOCK), 8)
    pool.reserve(1, 0, 4)
    pool.reserve(2, 0, 4)
    before = pool.storage.clone()
    shard = Shard(pool, [Row(1, 3, 1, True, ((0, 4),), (3,))], HEADS)
    new = torch.ones(1, HEADS, DIM), torch.ones(1, KV_HEADS, DIM), torch.ones(1, KV_HEADS, DIM)
    shard.attend(0, *new, SCALE)
    assert not shard.full
    shard.advance()
    assert shard.full
    after = pool.storage.clone()
    assert not torch.equal(before, after)
    with pytest.raises(PlanError, match="room for 4 tokens"):
        shard.attend(0, *new, SCALE)
    assert torch.equal(pool.storage, after)


def test_a_part_of_no_rows_has_no_tokens() -> None:
    pool = Pool(BlockShape(2, KV_HEADS, DIM, "float32", BLOCK), 8)
    shard = Shard(pool, [], HEADS)
    assert (shard.tokens, shard.appended, shard.full, shard.asked) == (0, 0, False, ())
    shard.advance()
