"""Figures of a simulation: throughput, refusals, moved blocks, and percentiles of latencies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distkv_dask.simulate.outcome import Outcome


def figures(outcome: Outcome) -> dict[str, Any]:
    """What ``distkv simulate --json`` writes.

    ``throughput_tps`` counts generated tokens of finished requests up to the last end; ``queue_s`` is the wait for
    room, ``ttft_s`` the time to the first token, both from the arrival on; ``tpot_s`` the time per token after the
    first. Percentiles are None when there is nothing to count.
    """
    runs = outcome.finished
    generated = sum(run.arrival.output for run, _ in runs)
    return {
        "policy": outcome.policy,
        "workers": outcome.workers,
        "requests": len(runs) + len(outcome.refused),
        "finished": len(runs),
        "refused": len(outcome.refused),
        "throughput_tps": generated / outcome.seconds if outcome.seconds else 0.0,
        "longest_context_tokens": max((run.arrival.tokens for run, _ in runs), default=0),
        "moved_blocks": outcome.moved_blocks,
        "queue_s": percentiles([run.admitted - run.arrival.at for run, _ in runs]),
        "ttft_s": percentiles([run.first - run.arrival.at for run, _ in runs]),
        "tpot_s": percentiles(
            [(end - run.first) / (run.arrival.output - 1) for run, end in runs if run.arrival.output > 1]
        ),
    }


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """The 50th, 90th and 99th percentile."""
    if not values:
        return dict.fromkeys(("p50", "p90", "p99"))
    return {f"p{share}": float(np.percentile(values, share)) for share in (50, 90, 99)}
