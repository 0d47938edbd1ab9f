"""How much does it help to know which links are slow? A simulation of two islands of hosts, joined by a slow link.

The same cluster serves the same requests twice: with a policy that knows the link of each pair of hosts, and with one
that assumes the fast link for all pairs. Work takes the same time in both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from _report import parser, report

from distkv_dask.scheduler.costs.presets import LINKS, PRESETS
from distkv_dask.scheduler.policies import POLICIES
from distkv_dask.simulate.cluster import Simulation
from distkv_dask.simulate.islands import between_islands
from distkv_dask.simulate.outcome import Outcome
from distkv_dask.simulate.workloads import WORKLOADS, workload_named


def served(workload: str, options: Any, known: bool) -> Outcome:
    """Simulate a workload with a policy that knows the slow links, or does not."""
    preset = PRESETS["a100-7b"]
    alike = replace(preset.model, between=LINKS[options.fast])
    links = between_islands(preset, options.workers, options.islands, LINKS[options.slow])
    mixed = replace(preset, model=replace(alike, links=links))
    simulation = Simulation(mixed, options.workers, options.policy)
    if not known:
        simulation.machine.state.know_costs(alike)
    return simulation.run(workload_named(workload).generate(options.requests, None, options.seed))


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--workloads", nargs="+", default=["v1-600k-30", "v2-2000k", "v2-600k"], choices=WORKLOADS)
    arguments.add_argument("--workers", type=int, default=32)
    arguments.add_argument("--islands", type=int, default=2)
    arguments.add_argument("--fast", default="ib-200", choices=LINKS, help="link between hosts of one island")
    arguments.add_argument("--slow", default="1gbe", choices=LINKS, help="link between islands")
    arguments.add_argument("--policy", default="best", choices=POLICIES)
    arguments.add_argument("--requests", type=int, default=60)
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    figures: dict[str, Any] = {}
    for workload in options.workloads:
        known, alike = (served(workload, options, known) for known in (True, False))
        figures[workload] = {
            "known_seconds": round(known.seconds, 1),
            "alike_seconds": round(alike.seconds, 1),
            "speedup": round(alike.seconds / known.seconds, 2),
            "finished": [len(known.finished), len(alike.finished)],
        }
    configuration = {name: value for name, value in vars(options).items() if name != "json"}
    report(figures, configuration, options.json)


if __name__ == "__main__":
    main()
