"""Holders outside a layer's window are not asked in that layer, on any channel or by tasks, and no token changes."""

from __future__ import annotations

import pytest
from _channels import Way
from _fakes import NEW, PROMPT, Fleet, fleet, loaded, prompt_ids, reference, state
from hypothesis import given
from hypothesis import strategies as st

from distkv_dask.geometry import LayerKind
from distkv_dask.worker.asked_layers import asked_layers, next_layers
from distkv_dask.worker.channels.bodies import Row

ROOM = (("w1", 24), ("w2", 24), ("w0", 48))  # queries from 70 on do not see tokens before 30
FULL = {"gemma2-short": 1, "gpt-oss-short": 1, "llama4-short": 1, "mistral-window": 0}
"""Number of layers that see everything."""


def asked(made: Fleet) -> dict[str, list[int]]:
    """Requests that each holder answers from now on, by gang."""
    counts: dict[str, list[int]] = {}

    def watch(worker: str) -> None:
        runtime = made.members[worker].runtime
        open_session = runtime.open_session

        def opened(gang):
            session = open_session(gang)
            session.result.add_done_callback(lambda done: counts.setdefault(worker, []).append(done.result().requests))
            return session

        runtime.open_session = opened  # type: ignore[method-assign]

    for worker in made.members.keys() - {"w0"}:
        watch(worker)
    return counts


@pytest.mark.parametrize("family", FULL)
def test_holders_outside_a_window_are_asked_in_other_layers_alone(way: Way, family: str) -> None:
    geometry = loaded(family).geometry
    with fleet(loaded(family), 3, way) as made:
        placement = made.place(1, *ROOM)
        first = made.prefill(1, placement, prompt_ids(PROMPT))
        counts = asked(made)
        result, _ = made.decode("w0", [state(1, placement, PROMPT, first, NEW - 1)], NEW)
    assert [first, *result.tokens[1]] == reference(family).tokens
    assert counts == {"w1": [FULL[family] * result.steps], "w2": [geometry.layers * result.steps]}
    answers = sum(map(sum, counts.values())) * geometry.heads * 4  # float32
    exchanged = result.exchanged
    assert exchanged.sent_bytes == answers * geometry.head_dim
    assert exchanged.received_bytes == answers * (geometry.head_dim + 1)


kinds = st.one_of(
    st.just(LayerKind()), st.builds(LayerKind, st.sampled_from(["sliding", "chunked"]), st.integers(1, 30))
)


@given(st.lists(kinds, min_size=1, max_size=6), st.integers(1, 30), st.integers(1, 60), st.integers(1, 4))
def test_who_is_not_asked_sees_nothing_in_any_later_step(
    kinds: list[LayerKind], stop: int, position: int, queries: int
) -> None:
    position = max(position, stop)
    held = Row(1, stop, queries, False, ((0, stop),), (position,))
    layers = asked_layers([held], kinds)
    for layer, kind in enumerate(kinds):
        sees = [max(0, kind.first(at)) < stop for at in range(position, position + 3 * queries)]
        assert sees == sorted(sees, reverse=True)
        assert (layer in layers) == sees[0]
    assert asked_layers([held._replace(appends=True)], kinds) == tuple(range(len(kinds)))


@given(st.sets(st.integers(0, 5)))
def test_layers_follow_each_other_around_a_step(asked: set[int]) -> None:
    after = next_layers(sorted(asked), 6)
    at, seen = after[-1], []
    while not seen or at > seen[-1]:
        seen.append(at)
        at = after[at]
    assert seen == (sorted(asked) or [0])
    assert at == seen[0]
