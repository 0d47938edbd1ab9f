"""The table of transitions: all of them happen, no others can, and only one module assigns states to requests."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest
from _simulated import cluster_of
from _situations import SITUATIONS
from test_states_and_events import live_after_each_event

import distkv_dask.scheduler.lifecycle.admission as admission
import distkv_dask.scheduler.lifecycle.transitions as transitions
from distkv_dask.sampling import SamplingParams
from distkv_dask.scheduler.records import states
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.request import Request
from distkv_dask.scheduler.records.states import State

SCHEDULER = Path(transitions.__file__).parents[1]
ALL_STATES = {
    one for one in vars(states).values() if isinstance(one, type) and issubclass(one, State) and one is not State
} - {states.FilesUnderWay}


def test_every_state_can_be_left_and_reached_but_the_last_and_each_has_a_name_of_its_own() -> None:
    assert {before for before, _ in transitions.TABLE} == ALL_STATES - {states.Gone}
    assert {after for _, after in transitions.TABLE} == ALL_STATES
    labels = Counter(one.label for one in ALL_STATES if one is not states.Gone)
    assert set(labels.values()) == {1}


def test_everything_in_the_table_happens_in_some_situation(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[type[State], type[State]]] = set()
    change = transitions.transition

    def watched(life: MachineState, request: Request, state: State) -> None:
        seen.add((type(request.state), type(state)))
        change(life, request, state)

    monkeypatch.setattr(transitions, "transition", watched)
    monkeypatch.setattr(admission, "transition", watched)
    for situation in SITUATIONS:
        live_after_each_event(situation)
    missing = {(before.__name__, after.__name__) for before, after in transitions.TABLE.keys() - seen}
    assert not missing, "no situation has these, or nothing needs them"


@pytest.mark.parametrize("before", sorted(ALL_STATES, key=lambda one: one.__name__))
@pytest.mark.parametrize("after", sorted(ALL_STATES, key=lambda one: one.__name__))
def test_what_is_not_in_the_table_is_a_fault_that_changes_nothing(before: type[State], after: type[State]) -> None:
    if (before, after) in transitions.TABLE:
        pytest.skip("this may happen")
    life = cluster_of(0, 10).life
    old, new = (one(0) if one is states.Prefill else one() for one in (before, after))
    request = Request(1, life.requests, SamplingParams(), 0.0, state=old)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=f"cannot go from {before.__name__} to {after.__name__}"):
        transitions.transition(life, request, new)
    assert request.state is old
    assert not life.commands


def test_only_the_table_gives_a_request_another_state() -> None:
    writers = set()
    for source in SCHEDULER.rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names = [one for target in targets for one in getattr(target, "elts", [target])]
            writers |= {
                f"{source.name}: {ast.unparse(one)}"
                for one in names
                if isinstance(one, ast.Attribute) and one.attr == "state"
            }
    lifecycle = "machine.py: self.state"  # the state of the whole machine
    assert writers == {"transitions.py: request.state", lifecycle}


def test_what_is_recommended_for_a_request_that_is_gone_is_dropped() -> None:
    cluster = cluster_of(0, 10)
    life = cluster.life
    gone = Request(7, life.requests, SamplingParams(), 0.0)  # type: ignore[arg-type]
    life.recommend(gone, states.Decode())
    transitions.settle(life)
    assert not life.recommendations
