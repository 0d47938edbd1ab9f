"""Plans of steps checked by counting: every query meets every stored token before it once; partials merge in order."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
from _examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from distkv_dask.errors import PlanError
from distkv_dask.geometry import LayerKind
from distkv_dask.placement import Placement, Span
from distkv_dask.worker.first_keys import FirstKeys
from distkv_dask.worker.plan import Stored, cut, merge_order, tail_of

BLOCK = 4
DOCUMENTS = {
    90: (Span("a", 0, 8), Span("b", 8, 16), Span("a", 16, 24)),
    91: (Span("c", 0, 12), Span("b", 12, 16)),
}


@st.composite
def sequences(draw: st.DrawFn) -> tuple[Placement, int]:
    """A placement that may begin with a document's, and a length that leaves room for three tokens in one span."""
    spans: list[Span] = []
    document = draw(st.none() | st.sampled_from(sorted(DOCUMENTS)))
    if document is not None:
        whole = DOCUMENTS[document]
        shared = draw(st.integers(1, whole[-1].stop // BLOCK)) * BLOCK
        spans += [
            Span(span.worker, span.start, min(span.stop, shared), document) for span in whole if span.start < shared
        ]
    own = spans[-1].stop if spans else 0
    at, last = own, ""
    for _ in range(draw(st.integers(1, 4))):
        worker = draw(st.sampled_from([name for name in "abc" if name != last]))
        stop = at + draw(st.integers(1, 3)) * BLOCK
        spans.append(Span(worker, at, stop))
        at, last = stop, worker
    tail = draw(st.sampled_from([span for span in spans if span.document is None]))
    return tuple(spans), draw(st.integers(tail.start, tail.stop - 3))


def stored(some: list[tuple[Placement, int]], queries: list[int]) -> list[Stored]:
    """A batch of sequences, each with its own number of new tokens."""
    return [
        Stored(number, placement, length, new)
        for number, ((placement, length), new) in enumerate(zip(some, queries, strict=False))
    ]


new_tokens = st.lists(st.integers(1, 3), min_size=5, max_size=5) | st.integers(1, 3).map(lambda count: [count] * 5)


@settings(max_examples=examples(200), deadline=None)
@given(st.lists(sequences(), min_size=1, max_size=5), new_tokens, st.booleans())
def test_every_query_meets_every_token_before_it_once(
    some: list[tuple[Placement, int]], queries: list[int], alike: bool
) -> None:
    batch = stored(some, queries)
    parts = cut(batch, alike)
    met: defaultdict[int, Counter[tuple[int, int]]] = defaultdict(Counter)
    appended: Counter[int] = Counter()
    for part in parts.values():
        tokens = iter(part.tokens)
        for row in part.rows:
            held = [at for start, stop in row.spans for at in range(start, stop)]
            for query in range(row.queries):
                token = next(tokens)
                seen = held[: row.length + (query + 1 if row.appends else 0)]
                met[token].update((row.sequence, at) for at in seen)
                appended[token] += row.appends
        assert next(tokens, None) is None
    owners = [(one, at) for one in batch for at in range(one.queries)]
    for token, (one, query) in enumerate(owners):
        owner = {at: span.document for span in one.placement for at in range(span.start, span.stop)}
        wanted = {(one.sequence if owner[at] is None else owner[at], at) for at in range(one.length + query + 1)}
        assert met[token] == Counter(wanted)
        assert appended[token] == 1, "its KV is stored in one place"


kinds = st.builds(LayerKind, st.sampled_from(["sliding", "chunked"]), st.integers(1, 30))


@settings(max_examples=examples(200), deadline=None)
@given(st.lists(sequences(), min_size=1, max_size=5), new_tokens, st.booleans(), kinds, st.integers(0, 2))
def test_windows_and_chunks_hide_the_tokens_before_them_wherever_they_lie(
    some: list[tuple[Placement, int]], queries: list[int], alike: bool, kind: LayerKind, steps: int
) -> None:
    batch = stored(some, queries)
    owners = [(one, at) for one in batch for at in range(one.queries)]
    steps *= len({one.queries for one in batch}) == 1 or alike  # parts of different sequences serve one step only
    for part in cut(batch, alike).values():
        first = FirstKeys(part.rows, [LayerKind(), kind])
        for _ in range(steps):
            first.advance()
        seen = iter(zip(part.tokens, first.tensors[kind].tolist(), strict=True))
        for row in part.rows:
            held = [at for start, stop in row.spans for at in range(start, stop)]
            for _ in range(row.queries):
                token, at = next(seen)
                one, ahead = owners[token]
                position = one.length + ahead + steps * (1 if alike else one.queries)
                begin = position - kind.size + 1 if kind.visible == "sliding" else position - position % kind.size
                assert held[at:] == [one for one in held if one >= begin]
        assert first.tensors.keys() == {kind}


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(sequences(), min_size=1, max_size=5), new_tokens, st.booleans())
def test_partials_are_merged_once_each_in_the_order_of_what_they_are_about(
    some: list[tuple[Placement, int]], queries: list[int], alike: bool
) -> None:
    batch = stored(some, queries)
    parts = cut(batch, alike)
    runs = merge_order(parts)
    first = {
        worker: [row.spans[0][0] for row in part.rows for _ in range(row.queries)] for worker, part in parts.items()
    }
    merged: Counter[tuple[str, int]] = Counter()
    order: defaultdict[int, list[int]] = defaultdict(list)
    for run in runs:
        for at in range(run.queries):
            assert parts[run.worker].tokens[run.query + at] == run.token + at
            merged[run.worker, run.query + at] += 1
            order[run.token + at].append(first[run.worker][run.query + at])
    assert merged == Counter((worker, at) for worker, part in parts.items() for at in range(len(part.tokens)))
    assert all(starts == sorted(starts) for starts in order.values())


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(sequences(), min_size=2, max_size=5), st.data())
def test_alike_a_sequences_rows_do_not_depend_on_who_decodes_beside_it(
    some: list[tuple[Placement, int]], data: st.DataObject
) -> None:
    batch = [Stored(number, placement, length) for number, (placement, length) in enumerate(some)]
    chosen = data.draw(st.sampled_from(batch))
    alone = cut([chosen], alike=True)
    beside = cut(batch, alike=True)
    place = batch.index(chosen)
    for worker, part in alone.items():
        tokens = iter(beside[worker].tokens)
        rows = [row for row in beside[worker].rows if [next(tokens) for _ in range(row.queries)] == [place]]
        assert rows == list(part.rows)


def test_questions_on_one_document_are_one_row_where_it_lies() -> None:
    shared = tuple(Span(span.worker, span.start, span.stop, 90) for span in DOCUMENTS[90])
    batch = [Stored(number, (*shared, Span("c", 24, 32)), 25 + number) for number in range(3)]
    parts = cut(batch)
    assert [row.queries for row in parts["a"].rows] == [3]
    assert parts["a"].rows[0].spans == ((0, 8), (16, 24))
    assert parts["a"].rows[0].length == 16
    assert [row.queries for row in parts["c"].rows] == [1, 1, 1]
    assert [row.queries for row in cut(batch, alike=True)["a"].rows] == [1, 1, 1]


def test_workers_whose_spans_are_empty_yet_are_left_out() -> None:
    placement = (Span("a", 0, 8), Span("b", 8, 16), Span("c", 16, 24))
    assert [*cut([Stored(1, placement, 5)])] == ["a"]
    assert {*cut([Stored(1, placement, 8)])} == {"a", "b"}


@pytest.mark.parametrize(("length", "worker"), [(0, "a"), (7, "a"), (8, "b"), (15, "b")])
def test_the_next_token_is_stored_where_its_place_is(length: int, worker: str) -> None:
    assert tail_of(1, (Span("a", 0, 8), Span("b", 8, 16)), length).worker == worker


def test_a_full_placement_is_a_fault_of_the_plan_of_that_sequence() -> None:
    with pytest.raises(PlanError, match="room reserved for 16") as caught:
        tail_of(3, (Span("a", 0, 8), Span("b", 8, 16)), 16)
    assert caught.value.sequence == 3
    with pytest.raises(PlanError, match="room reserved for 0"):
        cut([Stored(4, (), 0)])
