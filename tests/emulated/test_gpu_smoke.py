"""The script that is run first on a real card works: all its stages run on the emulated card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.thorough
def test_every_stage_is_right(tmp_path: Path) -> None:
    file = tmp_path / "smoke.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_smoke.py", "--emulated", "--json", str(file)],
        cwd=ROOT, env={**os.environ, "DASK_DISTKV__DEVICE": "auto"}, capture_output=True, text=True,
    )  # fmt: skip
    found = json.loads(file.read_text())
    assert found["failed"] == [], (found, done.stderr[-2000:])
    assert found["engine"]["local_tokens"]
    assert found["engine"]["split_tokens"]
