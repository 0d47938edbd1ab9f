"""How do the policies compare with each other and with the paper, in simulations of the paper's traces?

Settings: with or without prefill (the paper's performance model covers decode only), and hosts linked by 1 Gb/s
Ethernet (as in the paper's cluster) or 200 Gb/s InfiniBand. ``static`` is local-only with requests assigned round robin
to instances as they arrive, each with its own queue; ``tensor parallel`` is ``single`` without a pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from _report import parser, report

from distkv_dask.scheduler.costs.presets import LINKS, PRESETS, Preset
from distkv_dask.scheduler.policies import POLICIES
from distkv_dask.simulate.cluster import Simulation
from distkv_dask.simulate.outcome import Outcome
from distkv_dask.simulate.report import figures
from distkv_dask.simulate.traces import Arrival
from distkv_dask.simulate.workloads import WORKLOADS


def static(preset: Preset, workers: int, arrivals: list[Arrival], prefill: bool) -> Outcome:
    """Requests are assigned round robin to engines of one worker each when they arrive, and stay there."""
    ours = Outcome("static", workers)
    for number in range(workers):
        one = Simulation(preset, 1, "local-only", prefill=prefill).run(arrivals[number::workers])
        ours.finished += one.finished
        ours.refused += one.refused
        ours.seconds = max(ours.seconds, one.seconds)
    return ours


def geometric(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--workers", type=int, default=32)
    arguments.add_argument("--requests", type=int, help="number of requests (default: that of the workload)")
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--first-seed", type=int, default=0, help="policies were developed on seeds 0 and 10 to 13")
    arguments.add_argument("--links", nargs="+", default=["1gbe", "ib-200"])
    given = arguments.parse_args()
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    rows: dict[str, Any] = {}
    for link in given.links:
        model = replace(PRESETS["a100-7b"].model, between=LINKS[link])
        preset = replace(PRESETS["a100-7b"], model=model)
        for prefill in (False, True):
            setting = f"{link}, {'with' if prefill else 'without'} prefill"
            ratios: dict[str, float] = {}
            by_run: dict[str, float] = {}
            for name, workload in WORKLOADS.items():
                found: dict[str, list[Any]] = {}
                for seed in seeds:
                    arrivals = workload.generate(given.requests, seed=seed)
                    for policy in POLICIES:
                        outcome = Simulation(preset, given.workers, policy, prefill=prefill).run(arrivals)
                        found.setdefault(policy, []).append(figures(outcome))
                    outcome = Simulation(preset, given.workers, "single", prefill=prefill, pipeline=False).run(arrivals)
                    found.setdefault("tensor parallel", []).append(figures(outcome))
                    outcome = static(preset, given.workers, arrivals, prefill)
                    found.setdefault("static", []).append(figures(outcome))
                row = {
                    policy: {
                        "throughput_tps": geometric(one["throughput_tps"] for one in all_seeds),
                        "refused": sum(one["refused"] for one in all_seeds) / given.seeds,
                        "ttft_p50_s": geometric(one["ttft_s"]["p50"] for one in all_seeds) if prefill else None,
                        "longest_context_tokens": max(one["longest_context_tokens"] for one in all_seeds),
                    }
                    for policy, all_seeds in found.items()
                }
                ratios[name] = row["best"]["throughput_tps"] / row["greedy"]["throughput_tps"]
                for seed, ours, theirs in zip(seeds, found["best"], found["greedy"], strict=True):
                    by_run[f"{name}, seed {seed}"] = ours["throughput_tps"] / theirs["throughput_tps"]
                rows[f"{setting}: {name}"] = row
                speeds = "  ".join(f"{policy} {row[policy]['throughput_tps']:.1f}" for policy in row)
                print(f"{setting}: {name}: {speeds}", flush=True)
            worst, worst_run = min(ratios, key=lambda name: ratios[name]), min(by_run, key=lambda name: by_run[name])
            rows[f"{setting}: best over greedy"] = {
                "geometric_mean": geometric(ratios.values()),
                "worst": ratios[worst],
                "worst_workload": worst,
                "worst_run": worst_run,
                "worst_of_runs": by_run[worst_run],
                "runs_below_98_percent": sum(ratio < 0.98 for ratio in by_run.values()),
                "runs": len(by_run),
            }
            print(setting, rows[f"{setting}: best over greedy"], flush=True)
    setup = {"workers": given.workers, "seeds": given.seeds, "first_seed": given.first_seed}
    report({"results": rows}, setup, given.json)


if __name__ == "__main__":
    main()
