"""Measure this project on one card in under eight minutes: roofs, kernels, exchange, graphs, and a whole engine.

    python benchmarks/gpu_smoke.py --json smoke.json [--emulated]

Every stage has its own time limit, fails independently and prints its figures at once. ``--emulated`` runs small shapes
on an emulated card (tests/emulated), to test the script without a card; its times have no meaning.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import _report
from _smoke.stages import Stages

SECONDS = 470.0


def main() -> int:
    """Run all stages; 1 if one of them failed."""
    arguments = _report.parser(__doc__)
    arguments.add_argument("--emulated", action="store_true", help="run on an emulated card, with small shapes")
    given = arguments.parse_args()
    if given.emulated:
        os.environ["OMP_NUM_THREADS"] = "1"
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
        import emulated

        emulated.install(memory=2 << 30)
    import torch

    if not torch.cuda.is_available():
        print("torch finds no GPU here, so nothing was measured; --emulated runs the script on an emulated one")
        return 0
    stages = Stages(SECONDS)
    _run(stages, given.emulated)
    found: dict[str, Any] = dict(stages.found)
    failed = [name for name, figures in found.items() if not figures["ok"]]
    _report.report(found | {"failed": failed}, {"emulated": given.emulated, "seconds": SECONDS}, given.json)
    return int(bool(failed))


def _run(stages: Stages, small: bool) -> None:
    from _smoke import exchange, model
    from _smoke.kernels import Card

    card = Card(small)
    stages.run("environment", 60, card.roofs)
    stages.run("correct", 60, card.correct)
    stages.run("decode", 90, card.decode)
    stages.run("prefill", 60, card.prefill)
    stages.run("layer", 30, card.layer)
    stages.run("host_exchange", 30, partial(exchange.host, card))
    stages.run("model", 90, partial(model.steps, card))
    stages.run("engine", 180, partial(model.engine, card))


if __name__ == "__main__":
    sys.exit(main())
