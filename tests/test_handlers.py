"""Every message is handled in one place of each receiver, and every call uses arguments that its handler has."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

import distkv_dask
from distkv_dask.messages import from_worker, to_worker
from distkv_dask.messages.client_calls import ClientCall
from distkv_dask.messages.names import ToPeer
from distkv_dask.scheduler import commands
from distkv_dask.scheduler.dispatch import Dispatcher
from distkv_dask.scheduler.enact import enact
from distkv_dask.scheduler.gmanager import GManager
from distkv_dask.scheduler.lifecycle import events
from distkv_dask.scheduler.lifecycle.machine import Lifecycle
from distkv_dask.simulate.workers import Workers
from distkv_dask.worker.peers import Peers
from distkv_dask.worker.rmanager import RManager

PACKAGE = Path(distkv_dask.__file__).parent


def parsed(function: Callable[..., Any]) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


def cases(function: Callable[..., Any]) -> Counter[str]:
    """Classes in a function's ``match`` statements, and the number of cases of each without a further condition."""
    found: Counter[str] = Counter()
    for node in ast.walk(parsed(function)):
        if isinstance(node, ast.match_case):
            for pattern in ast.walk(node.pattern):
                if isinstance(pattern, ast.MatchClass) and not _inside_another(node.pattern, pattern):
                    found[ast.unparse(pattern.cls).split(".")[-1]] += node.guard is None
    return found


def _inside_another(whole: ast.pattern, pattern: ast.MatchClass) -> bool:
    """Whether a pattern is only a part of another class's pattern."""
    classes = [one for one in ast.walk(whole) if isinstance(one, ast.MatchClass) and one is not pattern]
    return any(part is pattern for one in classes for part in ast.walk(one))


def kinds(base: type) -> set[str]:
    return {one.__name__ for one in base.__subclasses__()}


FROM_WORKERS, TO_WORKERS = kinds(from_worker.FromWorker), kinds(to_worker.ToWorker)
ABOUT_ENGINES = {"Opened", "OpenFailed", "Closed", "Lost", "AdaptersKept"}
"""Messages of workers about themselves: the gManager handles these and tells the state machine about workers."""


def test_a_worker_takes_every_message_to_workers_in_one_case() -> None:
    assert cases(RManager._do) + cases(RManager._do_in) == Counter(TO_WORKERS)


def test_the_state_machine_takes_every_event_in_one_case() -> None:
    others = {one.__name__ for one in get_args(events.Event)} - {"FromWorker"}
    assert cases(Lifecycle._dispatch) == Counter((FROM_WORKERS - ABOUT_ENGINES) | others)


def test_the_gmanager_takes_what_workers_say_of_themselves() -> None:
    found = cases(Dispatcher.take_message)
    assert found.keys() >= ABOUT_ENGINES
    assert found.keys() <= FROM_WORKERS
    assert max(found.values()) == 1


def test_every_command_of_the_state_machine_is_carried_out() -> None:
    assert cases(enact).keys() == {one.__name__ for one in get_args(commands.Command)}


def test_simulated_workers_answer_what_workers_answer() -> None:
    answered = cases(Workers.answer).keys()
    assert answered == {"Retire", "Expect", "Send", "Relocate", "Store", "Fetch"}
    assert answered <= TO_WORKERS


# Calls


def handlers() -> dict[str, Callable[..., Any]]:
    """The gManager's handlers by the name of the call."""
    (table,) = [
        node.value
        for node in ast.walk(parsed(GManager.start))
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict)
        and any(isinstance(key, ast.Attribute) for key in node.value.keys)
    ]  # fmt: skip
    return {
        key.attr: getattr(GManager if ast.unparse(value.value) == "self" else Dispatcher, value.attr)
        for key, value in zip(table.keys, table.values, strict=True)
        if isinstance(key, ast.Attribute) and isinstance(value, ast.Attribute)
    }


def calls() -> Iterator[tuple[str, set[str]]]:
    """All calls of clients in the package: their names and arguments."""
    for path in sorted((PACKAGE / "client").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            given = {keyword.arg for keyword in node.keywords if keyword.arg}
            about = node.args[:1] if not isinstance(node.func, ast.Call) else node.func.args[1:2]
            if isinstance(node.func, ast.Name) and node.func.id == "partial":
                about = node.args[1:2]
            for one in about:
                if isinstance(one, ast.Attribute) and ast.unparse(one.value) == "ClientCall":
                    asks = isinstance(node.func, ast.Attribute) and node.func.attr.startswith("ask")
                    named = given | ({"engine"} if asks or given == set() else set())
                    yield one.attr, named


CALLS = list(calls())


def test_every_call_has_a_handler_and_somebody_who_calls() -> None:
    assert handlers().keys() == ClientCall.__members__.keys()
    assert {call for call, _ in CALLS} == ClientCall.__members__.keys()


@pytest.mark.parametrize(("call", "given"), CALLS, ids=[call for call, _ in CALLS])
def test_a_call_names_arguments_that_its_handler_has_and_all_that_it_needs(call: str, given: set[str]) -> None:
    parameters = [*inspect.signature(handlers()[call]).parameters.values()][1:]
    assert given <= {one.name for one in parameters}
    assert {one.name for one in parameters if one.default is inspect.Parameter.empty} <= given


@pytest.mark.parametrize(
    ("call", "caller", "handler"),
    [
        (ToPeer.BLOCKS, Peers._send_piece, Peers._take_blocks),
        (ToPeer.SPILLED, Peers.ask_spilled, Peers._read_spilled),
    ],
)
def test_workers_name_the_arguments_that_other_workers_handlers_have(
    call: ToPeer, caller: Callable[..., Any], handler: Callable[..., Any]
) -> None:
    (given,) = [
        {keyword.arg for keyword in node.keywords}
        for node in ast.walk(parsed(caller))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == call
    ]
    assert given == {*inspect.signature(handler).parameters} - {"self"}
