"""Faults of all kinds under a mixed load: nothing wrong, lost, hung or left (a short ``benchmarks/chaos.py``)."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
from _chaos.schedule import LOAD, WEIGHTS, errands, plan_faults

CHAOS = Path(__file__).parents[2] / "benchmarks" / "chaos.py"
SEED, SECONDS, EVERY = 5, 22.0, 1.5


def test_a_run_can_be_repeated_by_its_seed() -> None:
    plan = plan_faults(SEED, 300, 1.5)
    assert plan == plan_faults(SEED, 300, 1.5) != plan_faults(SEED + 1, 300, 1.5)
    assert {fault.kind for fault in plan} == set(WEIGHTS)
    assert [fault.at for fault in plan] == sorted(fault.at for fault in plan)
    assert all(0 < fault.at < 300 and 2 <= fault.seconds <= 20 for fault in plan)
    asked = list(islice(errands(SEED, 0), 500))
    assert asked == list(islice(errands(SEED, 0), 500)) != list(islice(errands(SEED, 1), 500))
    assert {errand.kind for errand in asked} == set(LOAD)


@pytest.mark.slow
@pytest.mark.thorough
def test_under_faults_of_all_kinds_no_answer_is_wrong_or_missing_and_nothing_is_left(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    options = ["--seed", SEED, "--minutes", SECONDS / 60, "--every", EVERY, "--few", "--json", found]
    command = [sys.executable, CHAOS, *map(str, options)]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stdout
    figures = json.loads(found.read_text())
    assert figures["plan"] == [list(fault) for fault in plan_faults(SEED, SECONDS, EVERY)]
    assert figures["requests"] == sum(figures[one] for one in ("completed", "cancelled", "failed_legitimately"))
    assert {one: figures[one] for one in ("wrong", "failed", "lost", "hung", "leaked")} == {
        "wrong": 0,
        "failed": 0,
        "lost": 0,
        "hung": 0,
        "leaked": [],
    }, f"{figures['anomalies']}; logs in {figures['logs']}"
    assert figures["faults_in_all"] > 5
