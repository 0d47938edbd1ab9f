"""Does anything go wrong when nearly everything does? Faults of all kinds under a mixed load, reproducible by a seed.

Processes are killed and frozen, those of clients too, links cut, machines join and are retired; blocks move, documents
are saved, loaded and spilled, requests cancelled and urgent ones squeezed in, while users ask plain, sampled, streamed
and structured questions, chat, and ask documents. Every answer is compared with the tokens that plain transformers
gives in one process, in float32. ``wrong`` are other tokens, ``lost`` requests whose end was never told, ``hung``
those that have not ended 75 s after the last fault, ``failed`` those that ended with an error although they could have
been served; ``failed_legitimately`` are those that lost blocks with a fourth worker, which are then asked again.
``leaks`` counts blocks, tasks, sockets, threads, files and processes that are left. Where something went wrong, the
logs are kept.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

from _chaos.network import enter
from _chaos.run import ENGINE, Setting, run
from _chaos.schedule import settings
from _report import parser, report

sys.path.append(str(Path(__file__).resolve().parent.parent))
from tests._models import text_model_dir

QUIET = "plan", "happened", "legitimate", "snapshot", "totals"
"""What stands in the JSON file only."""


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--seed", type=int, default=0, help="decides prompts, load and faults")
    arguments.add_argument("--minutes", type=float, default=1.0, help="how long faults happen")
    arguments.add_argument("--every", type=float, default=1.5, help="average seconds between two faults")
    arguments.add_argument("--users", type=int, default=6, help="how many users ask at the same time")
    arguments.add_argument("--few", action="store_true", help="few different prompts: they take seconds to prepare")
    arguments.add_argument("--tls", action="store_true", help="on a cluster with certificates")
    options = arguments.parse_args()
    cuttable = enter()
    setting = Setting(
        options.seed, options.minutes * 60, options.every, options.users, cuttable, options.few, options.tls
    )
    figures = run(text_model_dir(end=True), setting)
    report(figures, asdict(setting) | ENGINE | settings(options.seed), options.json)


if __name__ == "__main__":
    main()
