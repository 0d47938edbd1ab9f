"""Tests that need the card in the whole process run in one of their own: no other test's process has seen one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(Path(__file__).with_name("whole_process").glob("test_*.py"))


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("DISTKV_TEST_DEVICE") == "emulated", reason="they run by themselves then")
@pytest.mark.parametrize("tests", FILES, ids=lambda path: path.stem)
def test_in_a_process_of_their_own(tests: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--show-capture=no", "-p", "no:cacheprovider", str(tests)],
        cwd=ROOT, env={**os.environ, "DISTKV_TEST_DEVICE": "emulated"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " skipped" not in done.stdout.splitlines()[-1]
