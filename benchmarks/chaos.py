"""Does the engine survive faults of all kinds under a mixed load? Reproducible by a seed.

Workers, machines and clients are killed, workers are frozen, links are cut, machines join and workers are retired.
Blocks move; documents are saved, loaded and spilled; requests are cancelled, and urgent ones displace others. Meanwhile
users send plain, sampled, streamed and structured requests, chat, and ask about documents. Every answer is compared
with the tokens that transformers generates in one process, in float32. ``wrong`` counts answers with other tokens,
``lost`` requests whose end was never reported, ``hung`` those that have not ended 75 s after the last fault, ``failed``
those that ended with an error although they could have been served, and ``failed_legitimately`` those that lost blocks
for the fourth time (a save: for the third time); these are repeated. ``leaks`` counts blocks, tasks, sockets, threads,
files and processes that are left. The logs are kept if anything went wrong.
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
"""Results that are only in the JSON file."""


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--seed", type=int, default=0, help="seed of prompts, load and faults")
    arguments.add_argument("--minutes", type=float, default=1.0, help="how long faults are injected")
    arguments.add_argument("--every", type=float, default=1.5, help="average seconds between two faults")
    arguments.add_argument("--users", type=int, default=6, help="number of users")
    arguments.add_argument("--few", action="store_true", help="few different prompts: they take seconds to prepare")
    arguments.add_argument("--tls", action="store_true", help="use a cluster with certificates")
    options = arguments.parse_args()
    cuttable = enter()
    setting = Setting(
        options.seed, options.minutes * 60, options.every, options.users, cuttable, options.few, options.tls
    )
    figures = run(text_model_dir(end=True), setting)
    report(figures, asdict(setting) | ENGINE | settings(options.seed), options.json)


if __name__ == "__main__":
    main()
