"""Tests that need the card from the start of a process run in a separate one, so that other tests see no card."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = Path(__file__).with_name("whole_process")


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(os.environ.get("DISTKV_TEST_DEVICE") == "emulated", reason="they run by themselves then")
@pytest.mark.parametrize("part", ["not thorough", pytest.param("thorough", marks=pytest.mark.thorough)])
def test_in_a_process_of_their_own(part: str) -> None:
    """One process for all files, because another one, with a server that forks workers, takes 15 s of a core."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--show-capture=no", "-p", "no:cacheprovider", "-m", part, str(TESTS)],
        cwd=ROOT, env={**os.environ, "DISTKV_TEST_DEVICE": "emulated"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " skipped" not in done.stdout.splitlines()[-1]
