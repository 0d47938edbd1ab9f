"""A GPU's work list covers every visible key of every query once, and its size does not depend on the step."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distkv_dask.kernels.triton_plan import ITEM, MIN_PIECE, Shape, WorkList
from distkv_dask.kernels.triton_tiles import Tiles

FEW, MANY = Tiles(16, 64, 4, 3), Tiles(128, 64, 8, 3)
GROUP, D, BLOCK = 4, 64, 64


def made(
    queries: list[int], kv_heads: int = 8, processors: int = 132, room: int = 1 << 17, group: int = GROUP
) -> WorkList:
    return WorkList(Shape(queries, group, kv_heads, room, BLOCK, D), (FEW, MANY), processors)


def written(
    work: WorkList, lengths: list[int], starts: list[int] | None = None, first_keys: list[int] | None = None
) -> np.ndarray[Any, Any]:
    values = np.full(work.size, -77, np.int32)
    edges = (None if edge is None else np.array(edge, np.int64) for edge in (starts, first_keys))
    work.write(values, np.array(lengths, np.int64), *edges)
    return values


def items_of(work: WorkList, values: np.ndarray[Any, Any]) -> list[tuple[Tiles, np.ndarray[Any, Any]]]:
    return [
        (launch.tiles, item)
        for launch in work.launches
        for item in values[launch.at :][: ITEM * launch.items].reshape(-1, ITEM)
        if item[0]
    ]


EDGES = [-(2**31), -5, 0, 1, 63, 64, 65, 500, 1000, 2048, 4000, 5055, 2**31 - 1]
rows = st.lists(
    st.tuples(st.sampled_from([0, 1, 1, 1, 3, 4, 5, 40, 97]), st.integers(0, 5000), st.integers(-60, 6000)),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, max_examples=60)
@given(
    rows,
    st.booleans(),
    st.none() | st.randoms(use_true_random=False),
    st.sampled_from([1, 3, 4, 12]),
    st.sampled_from([1, 2, 8]),
    st.sampled_from([4, 132]),
)
def test_every_visible_key_of_every_query_is_attended_to_once(
    rows: list[tuple[int, int, int]], causal: bool, windows: Random | None, group: int, kv_heads: int, processors: int
) -> None:
    counts, lengths, starts = (list(column) for column in zip(*rows, strict=True))
    work = made(counts, kv_heads, processors, room=5056, group=group)
    first_keys = None if windows is None else [windows.choice(EDGES) for _ in range(sum(counts))]
    values = written(work, lengths, starts if causal else None, first_keys)
    tokens = values[work.tokens_at :][: 2 * sum(counts)].reshape(-1, 2)
    entries = values[work.entries_at :][: 2 * work.partials].reshape(-1, 2)
    firsts = np.cumsum([0, *counts])
    seen = [np.zeros((count, group, length), np.int8) for count, length in zip(counts, lengths, strict=True)]
    owner: dict[int, list[int]] = {}
    for tiles, (count, row, first, packed, low, high, start, to) in items_of(work, values):
        assert (count, first) == (counts[row], firsts[row])
        assert windows or low % max(tiles.tokens, BLOCK) == 0
        assert low <= high <= lengths[row] or low == high
        for at in range(packed, min(packed + tiles.rows, count * group)):
            query, head = divmod(at, group)
            begin = low if first_keys is None else max(low, first_keys[first + query])
            seen[row][query, head, begin : max(begin, min(high, start + query + 1))] += 1
            if head == 0:
                owner.setdefault(first + query, []).append(int(to) + query if to >= 0 else int(to) - query)
    for row, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        for query in range(count):
            visible = np.clip(starts[row] + query + 1, 0, length) if causal else length
            begin = 0 if first_keys is None else max(0, first_keys[firsts[row] + query])
            assert (seen[row][query, :, begin:visible] == 1).all()
            assert not seen[row][query, :, visible:].any()
            assert not seen[row][query, :, :begin].any()
    for token in range(sum(counts)):
        begin, parts = tokens[token]
        if parts < 0:
            assert owner[token] == [token]
            continue
        wanted = [-1 - to for to in owner[token]]
        assert len(set(wanted)) == parts == len(wanted)
        assert sorted(entries[begin : begin + parts].tolist()) == sorted(
            [partial * D, work.partials * D + partial] for partial in wanted
        )


def test_a_long_row_among_short_ones_fills_the_card_and_begins_first() -> None:
    work = made([1] * 64)
    items = [item for _, item in items_of(work, written(work, [131072] + [1024] * 63))]
    of_long = [item for item in items if item[1] == 0]
    assert len(of_long) * 8 > 132
    assert [item[1] for item in items[: len(of_long)]] == [0] * len(of_long)
    assert max(item[5] - item[4] for item in items) < 131072 / 32


@pytest.mark.parametrize("queries", [1, 16, 2048])
def test_a_window_over_a_long_row_is_read_as_far_as_it_goes(queries: int) -> None:
    work, length = made([queries]), 131072
    first_keys = list(range(length - queries - 1023, length - 1023))
    items = [item for _, item in items_of(work, written(work, [length], [length - queries], first_keys))]
    tokens = sum(max(0, int(item[5] - item[4])) for item in items)
    tiles = len({int(item[3]) for item in items})
    assert tokens <= tiles * (1024 + MANY.rows // GROUP)
    assert len([item for item in items if item[5] > item[4]]) >= 3


def test_short_rows_are_not_cut() -> None:
    work = made([1] * 3)
    assert len(items_of(work, written(work, [MIN_PIECE] * 3))) == 3
    assert made([1], room=2 * MIN_PIECE - 1).partials == 0


@pytest.mark.parametrize("queries", [[1] * 64, [16, 1, 1, 1], [512]])
def test_a_growing_sequence_changes_neither_sizes_nor_launches(queries: list[int]) -> None:
    work = made(queries)
    before = work.size, list(map(id, work.launches)), work.partials
    for length in (1, 300, 4000, 131072):
        lengths = [length] * len(queries)
        values = written(work, lengths)
        assert len(items_of(work, values)) >= len(queries)
    assert before == (work.size, list(map(id, work.launches)), work.partials)


def test_parts_of_the_list_lie_where_compiled_kernels_expect_them() -> None:
    for queries in ([1], [1, 1, 1], [5, 40, 1]):
        work = made(queries)
        assert {at % 4 for at in (work.tokens_at, work.entries_at, work.size, *(x.at for x in work.launches))} == {0}
