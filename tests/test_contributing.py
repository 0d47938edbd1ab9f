"""The examples for people who change the package do what they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

from distkv_dask.placement import Endpoint, Placement, Span
from distkv_dask.scheduler.costs.presets import PRESET
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.lifecycle import transitions
from distkv_dask.scheduler.policies.base import Ask
from distkv_dask.scheduler.policies.local_only import LocalOnly
from distkv_dask.scheduler.records.machine_state import MachineState

TEXT = (Path(__file__).parents[1] / "docs" / "contributing.md").read_text()


def example(title: str) -> str:
    found = re.search(rf"### {title}\n.*?```python\n(.*?)```", TEXT, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_example_of_a_policy_places_requests_where_it_says() -> None:
    names: dict[str, Any] = {
        "LocalOnly": LocalOnly, "ClassVar": ClassVar, "Ledger": Ledger, "Ask": Ask, "Placement": Placement,
        "Span": Span,
    }  # fmt: skip
    exec(example("A policy, for example"), names)
    policy = names["Quietest"](PRESET)
    ledger = Ledger(16)
    ledger.add_worker(Endpoint("a", "host", 1), 100)
    ledger.add_worker(Endpoint("b", "host", 2), 10)
    for number, home in enumerate("abab"):
        placement = policy.place(ledger, Ask(number, 16, 32))
        assert placement == (Span(home, 0, 32),)
        ledger.reserve(number, placement)
    assert policy.place(ledger, Ask(9, 16, 16 * 20)) == (Span("a", 0, 16 * 20),)
    assert policy.place(ledger, Ask(9, 16, 16 * 101)) is None
    assert policy.limit(ledger) == 100


def test_the_example_of_a_state_names_states_and_functions_that_exist() -> None:
    rows = re.findall(r"`\((\w+), (\w+)\): (\w+)\.(\w+)`", TEXT)
    assert len(rows) == 3
    for before, after, module, function in rows:
        assert "Suspended" in (before, after)
        assert all(hasattr(transitions, state) for state in {before, after} - {"Suspended"})
        assert module == "suspension" or hasattr(getattr(transitions, module), function)
    (called,) = re.findall(r"calls\s+`documents\.(\w+)`", TEXT)
    assert hasattr(transitions.documents, called)
    assert {"recommend", "command"} <= vars(MachineState).keys()
