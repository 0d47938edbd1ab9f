"""Where windows and chunks begin in a worker's KV of a sequence, compared with counting token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distkv_dask.geometry import LayerKind
from distkv_dask.worker.channels.bodies import Row
from distkv_dask.worker.first_keys import FirstKeys

FULL, SLIDING, CHUNKED = LayerKind(), LayerKind("sliding", 12), LayerKind("chunked", 10)


def sees(kind: LayerKind, query: int, key: int) -> bool:
    """Whether a token sees one that is not after it, by the rule of transformers."""
    if kind.visible == "sliding":
        return key > query - kind.size
    return kind.visible == "full" or key // kind.size == query // kind.size


def counted(row: Row, kind: LayerKind, step: int) -> list[int]:
    """How many of the tokens in a worker's spans come before the first one that each query sees."""
    each = row.queries // len(row.positions)
    places = [at for start, stop in row.spans for at in range(start, stop)]
    firsts = []
    for first in row.positions:
        for at in range(each):
            query = first + step * each + at
            firsts.append(sum(key <= query and not sees(kind, query, key) for key in places))
    return firsts


@st.composite
def rows(draw: st.DrawFn) -> Row:
    """A row of some sequences over spans with gaps, which are on other workers."""
    ends = sorted(draw(st.sets(st.integers(0, 60), min_size=2, max_size=6)))
    spans = tuple(zip(ends[::2], ends[1::2], strict=False))
    positions = tuple(draw(st.lists(st.integers(0, 90), min_size=1, max_size=4)))
    each = draw(st.integers(1, 5))
    return Row(1, 0, each * len(positions), False, spans, positions)


@settings(deadline=None)
@given(
    st.lists(rows(), min_size=1, max_size=4),
    st.builds(LayerKind, st.sampled_from(["sliding", "chunked"]), st.integers(1, 40)),
    st.integers(0, 3),
)
def test_queries_begin_where_counting_says_in_any_step(batch: list[Row], kind: LayerKind, steps: int) -> None:
    keys = FirstKeys(batch, [FULL, kind])
    for _ in range(steps):
        keys.advance()
    assert keys.tensors.keys() == {kind}, "layers that see everything need none"
    assert keys.tensors[kind].dtype == torch.int32
    assert keys.tensors[kind].tolist() == [one for row in batch for one in counted(row, kind, steps)]


def test_kernels_that_have_the_memory_see_the_next_step_in_it() -> None:
    keys = FirstKeys([Row(1, 16, 1, True, ((0, 32),), (16,))], [SLIDING, CHUNKED])
    sliding, chunked = keys.tensors[SLIDING], keys.tensors[CHUNKED]
    found = []
    for _ in range(5):
        found.append((int(sliding), int(chunked)))
        keys.advance()
    assert found == [(5, 10), (6, 10), (7, 10), (8, 10), (9, 20)]
    assert (int(sliding), int(chunked)) == (10, 20)
    assert sliding is keys.tensors[SLIDING]


def test_soft_caps_alone_make_no_other_window() -> None:
    capped = LayerKind("sliding", 12, soft_cap=30.0)
    keys = FirstKeys([Row(1, 0, 3, False, ((0, 8), (24, 40)), (20, 30, 50))], [SLIDING, capped])
    assert keys.tensors[SLIDING].tolist() == keys.tensors[capped].tolist() == [8, 8, 23]


@pytest.mark.parametrize("spans", [((0, 0),), ((8, 8), (8, 16))])
def test_a_span_without_tokens_hides_none(spans: tuple[tuple[int, int], ...]) -> None:
    row = Row(1, 0, 2, True, spans, (20,))
    assert FirstKeys([row], [SLIDING]).tensors[SLIDING].tolist() == counted(row, SLIDING, 0)


def test_no_rows_are_no_queries() -> None:
    assert FirstKeys([], [SLIDING]).tensors[SLIDING].shape == (0,)
