"""What every benchmark prints with its figures (commit, hardware, configuration), and ``--json FILE``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any


def parser(description: str | None) -> argparse.ArgumentParser:
    """Argument parser with the option that all benchmarks share."""
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    return arguments


def environment() -> dict[str, Any]:
    """Commit, processor and versions."""
    root = Path(__file__).resolve().parent.parent
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
    )
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        facts = {name.strip(): value.strip() for name, _, value in lines}
        processor = facts.get("model name", processor)
        if "cpu family" in facts:  # some hosts hide the model's name, but not its generation
            processor += f" (family {facts['cpu family']}, model {facts['model']})"
    return {
        "commit": git.stdout.strip() or "unknown",
        "processor": processor,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "distributed")},
    }


def report(figures: dict[str, Any], configuration: dict[str, Any], file: Path | None) -> None:
    """Print everything, and write it to ``file`` if there is one."""
    whole = environment() | {"configuration": configuration} | figures
    for name, value in whole.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    if file is not None:
        file.write_text(json.dumps(whole, indent=1) + "\n")
