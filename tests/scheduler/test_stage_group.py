"""The group of an engine in stages: no worker has two stages, and the home opens when all others have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from distkv_dask.messages.from_worker import Closed, Lost
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
    group, facts = Group(spec(count)), dict[str, Any]()
    for worker, comes in events:
        if comes:
            if not group.assign_stage(worker):
                continue
            found = group.openings(worker, facts)
            if worker != group.home:
                assert (found[0].worker, found[0].stage) == (worker, Stage(group.places.index(worker), count))
                facts[worker] = SimpleNamespace(endpoint=Endpoint(worker, "host", 1), capacity_blocks=ord(worker))
                found = group.openings(worker, facts)
            assert len(found) == all(group.places)
            if found:
                stage = found[0].stage
                assert found[0].worker == group.home
                assert stage is not None
                assert [one.worker for one in stage.further] == group.places[1:]
                assert stage.blocks == min(ord(one) for one in group.places[1:])
        else:
            had, home = worker in group.places, group.home
            assert group.leave(worker) == ((home if worker != home else "") if had else None)
            assert not (had and group.home), "it would wait for ever to be asked"
            facts.pop(worker, None)
        there = [one for one in group.places if one]
        assert len({*there}) == len(there)


def test_what_a_home_tells_after_it_was_told_to_close_is_of_an_earlier_time() -> None:
    group, facts = (
        Group(spec(2)),
        {"b": cast(Any, SimpleNamespace(endpoint=Endpoint("b", "host", 1), capacity_blocks=1))},
    )
    assert group.assign_stage("b")
    assert group.assign_stage("a")
    assert group.openings("a", facts)
    assert group.leave("b") == "a"
    assert group.is_old(Lost("a", "its lanes ended"))
    assert not group.is_old(Lost("c", "its lanes ended"))
    assert group.is_old(Closed("a"))
    assert not group.is_old(Lost("a", "its lanes ended"))


def test_a_worker_that_could_not_open_its_stage_gets_none_again() -> None:
    group = Group(spec(2))
    assert group.assign_stage("a")
    group.fail("a")
    assert group.leave("a") == ""
    assert not group.assign_stage("a")
    assert group.assign_stage("b")


def spec(stages: int) -> Any:
    return SimpleNamespace(config=SimpleNamespace(stage_count=stages))
