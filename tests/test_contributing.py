"""The examples in docs/contributing.md apply to the current package, which then passes its tests and type checks."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests._thorough import some_of

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "contributing.md").read_text()
COPIED = "distkv_dask", "kernels", "graphs", "tests", "benchmarks"

TESTS = {
    "A policy, for example": ("tests/scheduler/test_policies.py", "tests/scheduler/test_policies_by_force.py",
                              "tests/scheduler/test_set_aside.py", "tests/test_config.py", "-k", "quietest or config"),
    "A message to workers": ("tests/test_stream_messages.py",),
    "A state of a request": ("tests/scheduler/test_transitions.py", "tests/scheduler/test_states_and_events.py"),
    "A kind of attention": ("tests/kernels/test_contract.py", "-k", "position_biases"),
}  # fmt: skip
"""Heading of an example -> tests that it must pass."""


def changes(title: str) -> Iterator[tuple[str, str]]:
    """Files that an example changes, each with its hunks."""
    (section,) = re.findall(rf"^### {title}\n(.*?)(?=^##|\Z)", TEXT, re.MULTILINE | re.DOTALL)
    for block in re.findall(r"^```diff\n(.*?)^```", section, re.MULTILINE | re.DOTALL):
        for one in re.split(r"^\+\+\+ ", block, flags=re.MULTILINE)[1:]:
            name, _, hunks = one.partition("\n")
            yield name, hunks


def apply(root: Path, title: str) -> None:
    """Make an example's changes; the text that a hunk replaces must occur in its file exactly once."""
    for name, text in changes(title):
        file = root / name
        new, *hunks = re.split(r"^@@\n", text, flags=re.MULTILINE)
        if new:
            assert not file.exists()
            file.write_text("".join(f"{line[1:]}\n" for line in new.splitlines()))
        for hunk in hunks:
            lines = hunk.splitlines()
            before, after = (
                "".join(f"{line[1:]}\n" for line in lines if not line.startswith(left_out)) for left_out in "+-"
            )
            content = file.read_text()
            assert content.count(before) == 1, f"{name} has {content.count(before)} times:\n{before}"
            file.write_text(content.replace(before, after))


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with all examples."""
    root = tmp_path_factory.mktemp("changed")
    for name in COPIED:
        shutil.copytree(ROOT / name, root / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    for title in TESTS:
        apply(root, title)
    return root


def run(root: Path, *arguments: str) -> None:
    """Run a Python module in this folder, with the changed package."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("title", some_of(TESTS, "A message to workers", "A kind of attention"))
def test_an_example_applies_to_the_code_and_passes_its_tests(changed: Path, title: str) -> None:
    run(changed, "pytest", "-q", "-p", "no:cacheprovider", *TESTS[title])


@pytest.mark.thorough
@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed: make lint installs it")
def test_the_examples_have_right_types(changed: Path) -> None:
    run(changed, "mypy")


def test_the_example_of_a_policy_takes_the_worker_that_decodes_least(changed: Path) -> None:
    program = """
from distkv_dask.placement import Endpoint, Span
from distkv_dask.scheduler.costs.presets import PRESET
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.policies import policy_named
from distkv_dask.scheduler.policies.base import Ask

policy, ledger = policy_named("quietest", PRESET), Ledger(16)
ledger.add_worker(Endpoint("a", "host", 1), 100)
ledger.add_worker(Endpoint("b", "host", 2), 10)
for number, home in enumerate("abab"):
    placement = policy.place(ledger, Ask(number, 16, 32))
    assert placement == (Span(home, 0, 32),)
    ledger.reserve(number, placement)
assert policy.place(ledger, Ask(9, 16, 16 * 20)) == (Span("a", 0, 16 * 20),)
assert policy.place(ledger, Ask(9, 16, 16 * 101)) is None
"""
    (changed / "example_of_a_policy.py").write_text(program)
    run(changed, "example_of_a_policy")
    workload = ["--workload", "v2-short-3", "--requests", "4"]
    run(changed, "distkv_dask.client.cli", "simulate", "--policy", "quietest", *workload)
