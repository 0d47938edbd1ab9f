"""The table of transitions: all of them happen, no others can, and only one module assigns states to requests."""

from __future__ import annotations

import ast
from array import array
from collections import Counter
from pathlib import Path

import pytest
from _simulated import cluster_of
from _situations import SITUATIONS
from test_states_and_events import live_after_each_event

import distkv_dask.scheduler.lifecycle.transitions as transitions
from distkv_dask.scheduler.records import states
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.request import Asked, Request
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
    request = Request(1, array("i"), Asked(0.0))
    request.state = old
    with pytest.raises(RuntimeError, match=f"cannot go from {before.__name__} to {after.__name__}"):
        transitions.transition(life, request, new)
    assert request.state is old
    assert not life.commands


CHANGES = {
    "add", "append", "appendleft", "clear", "difference_update", "discard", "extend", "insert", "pop", "popitem",
    "popleft", "remove", "setdefault", "subtract", "update",
}  # fmt: skip
"""Methods that change a collection."""


def is_state(node: ast.AST) -> bool:
    """Whether an expression is a request's state; ``self.state`` is that of the whole machine."""
    return isinstance(node, ast.Attribute) and node.attr == "state" and ast.unparse(node) != "self.state"


def states_in(function: ast.FunctionDef) -> set[str]:
    """Names that a function has for states of requests: what it got as a state, or took from a request."""
    kinds = {one.__name__ for one in vars(states).values() if isinstance(one, type) and issubclass(one, State)}
    arguments = [*function.args.args, *function.args.kwonlyargs]
    named = {one.arg for one in arguments if one.annotation is not None and ast.unparse(one.annotation) in kinds}
    named.add("state")  # of a loop, for instance
    for node in ast.walk(function):
        pairs: list[tuple[ast.expr, ast.expr]] = []
        match node:
            case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
                pairs = [*zip(targets, values, strict=True)]
            case ast.Assign(targets=[target], value=value) | ast.NamedExpr(target=target, value=value):
                pairs = [(target, value)]
        named |= {target.id for target, value in pairs if isinstance(target, ast.Name) and is_state(value)}
    return named


def changed(node: ast.AST) -> list[ast.expr]:
    """What a statement, or a call of a method that changes a collection, assigns to, deletes or changes."""
    match node:
        case ast.Assign(targets=targets) | ast.Delete(targets=targets):
            return [one for target in targets for one in getattr(target, "elts", [target])]
        case ast.AugAssign(target=target) | ast.AnnAssign(target=target) | ast.For(target=target):
            return [target]
        case ast.Call(func=ast.Attribute(value=value, attr=name)) if name in CHANGES:
            return [ast.Subscript(value, ast.Constant(0), ast.Store())]
    return []


def data_of_state(target: ast.expr, named: set[str]) -> bool:
    """Whether a target is an attribute of a state, or in one."""
    while isinstance(target, ast.Attribute | ast.Subscript):
        inner = target.value
        if is_state(inner) or (isinstance(inner, ast.Name) and inner.id in named):
            return isinstance(target, ast.Attribute)
        target = inner
    return False


def writers_in(tree: ast.AST) -> set[str]:
    """What a module does to states of requests: which it gives them, and which of their data it changes."""
    found = set()
    for node in ast.walk(tree):
        found |= {ast.unparse(one) for one in changed(node) if isinstance(one, ast.Attribute) and one.attr == "state"}
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("Request", "cls", "replace"):
            found |= {ast.unparse(node) for keyword in node.keywords if keyword.arg == "state"}
        if isinstance(node, ast.FunctionDef):
            named = states_in(node)
            found |= {ast.unparse(one) for part in ast.walk(node) for one in changed(part) if data_of_state(one, named)}
    return found


ROOMS = "lifecycle", "records", "work", "cache", "moves", "policies"
"""Rooms of the scheduler that know states of requests."""


def test_only_the_table_gives_a_request_another_state_and_only_states_change_their_data() -> None:
    sources = [source for room in ROOMS for source in (SCHEDULER / room).glob("*.py")]
    written = {(source.name, one) for source in sources for one in writers_in(ast.parse(source.read_text()))}
    assert [one.name for one in sources if "transition(" in one.read_text()] == ["transitions.py"]
    assert written == {
        ("transitions.py", "request.state"),
        ("request.py", "request.state"),  # of_cached: its first state
        ("machine.py", "self.state"),  # the state of the whole machine
    }


@pytest.mark.parametrize(
    "line",
    [
        "request.state = Gone()",
        "x, request.state = 1, Gone()",
        "Request(1, state=Stored())",
        "request.state.again = False",
        "state.answering, state.asked = {1}, life.now",
        "state.failures += 1",
        "state.workers.discard(worker)",
        "state.chunks[number] = chunk",
        "del state.chunks[number]",
        "life.requests[number].state.early.clear()",
        "before.workers.add(worker)",
        "prefill = request.state; prefill.rests_until = 1",
        "use(mine := one.state); mine.lost = ()",
    ],
)
def test_a_line_that_writes_a_state_is_seen(line: str) -> None:
    function = f"def change(life: MachineState, request: Request, before: State) -> None:\n    {line}"
    assert writers_in(ast.parse(function))


def test_what_is_ended_already_is_not_ended_again() -> None:
    life = cluster_of(0, 10).life
    request = Request(1, array("i"), Asked(0.0))
    for state in (states.Retiring, states.Spilling):
        request.state = state()
        with pytest.raises(RuntimeError, match=f"request 1 is {state.label} already"):
            transitions.transition(life, request, state())


def test_what_is_recommended_for_a_request_that_is_gone_is_dropped() -> None:
    cluster = cluster_of(0, 10)
    life = cluster.life
    gone = Request(7, array("i"), Asked(0.0))
    life.recommend(gone, states.Decode())
    transitions.settle(life)
    assert not life.recommendations
