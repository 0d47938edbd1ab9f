"""The group of an engine in stages: no worker has two stages, and the home opens when all others have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from distkv_dask.placement import Endpoint, Stage
from distkv_dask.scheduler.engines.group import Group


@given(st.integers(1, 200), st.integers(1, 32))
def test_stages_have_every_layer_once_and_none_is_empty(layers: int, count: int) -> None:
    if count > layers:
        return
    runs = [Stage(number, count).layers(layers) for number in range(count)]
    assert [layer for first, stop in runs for layer in range(first, stop)] == list(range(layers))
    sizes = [stop - first for first, stop in runs]
    assert sizes[0] == min(sizes) >= 1
    assert max(sizes) <= min(sizes) + 1


@given(st.integers(2, 5), st.lists(st.tuples(st.sampled_from("abcdefg"), st.booleans()), max_size=40))
def test_a_home_opens_once_each_time_that_all_stages_are_there(count: int, events: list[tuple[str, bool]]) -> None:
    group, facts, asked = Group(count), dict[str, Any](), False
    for worker, comes in events:
        if comes:
            number = group.take(worker)
            if number:
                endpoint = Endpoint(worker, "host", 1)
                facts[worker] = SimpleNamespace(endpoint=endpoint, capacity_blocks=ord(worker))
        else:
            number = group.leave(worker)
            facts.pop(worker, None)
            asked &= number != 0
        there = [one for one in group.places if one]
        assert len({*there}) == len(there)
        stage = group.first_stage(facts)
        complete = all(group.places)
        assert (stage is not None) == (complete and not asked)
        if stage is not None:
            asked = True
            assert [one.worker for one in stage.further] == group.places[1:]
            assert stage.blocks == min(ord(one) for one in group.places[1:])
        if asked and not complete:  # as the dispatcher does, which closes such a home
            group.leave(group.home)
            asked = False
