"""What does the gManager's bookkeeping cost with 32, 1,000 and 10,000 workers and 100,000 running requests?

A decision is the admission of one request: policy, reservation and all indices. A release, one call of the policy's
``moves``, and the memory of ledger and requests are measured, too.
"""

from __future__ import annotations

import gc
import random
import time
import tracemalloc
from typing import Any

import numpy as np
from _report import parser, report

from distkv_dask.placement import Endpoint
from distkv_dask.scheduler.costs.presets import PRESETS
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.lifecycle.admission import reserve
from distkv_dask.scheduler.policies import policy_named
from distkv_dask.scheduler.policies.base import Ask
from distkv_dask.scheduler.policies.queue import Queue

MODEL = PRESETS["a100-7b"].model


def measure(policy: str, workers: int, live: int, rounds: int) -> dict[str, Any]:
    rng = random.Random(0)
    blocks = 40 * live // workers  # so that the cluster is about three quarters full
    tracemalloc.start()
    ledger = Ledger(64)
    queue = Queue(ledger, policy_named(policy, MODEL))
    for number in range(workers):
        ledger.add_worker(Endpoint(f"tcp://10.0.0.1:{number}", f"host{number // 8}", 0), blocks)
    asks = (Ask(number, tokens := int(64 * rng.lognormvariate(3, 0.9)) + 64, tokens + 64) for number in range(10**9))
    while len(ledger.sequences) < live:
        queue.enqueue(next(asks))
        chosen = queue.choose()
        assert chosen is not None
        reserve(ledger, *chosen)
        ledger.commit(chosen[0].sequence, chosen[0].prompt)
    memory = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    seconds: dict[str, list[float]] = {"decision": [], "release": [], "moves": []}
    numbers = list(ledger.sequences)
    gc.freeze()
    for _ in range(rounds):
        at = rng.randrange(len(numbers))
        numbers[at], numbers[-1] = numbers[-1], numbers[at]
        released, ask = numbers.pop(), next(asks)
        queue.enqueue(ask)
        clock = [time.perf_counter()]
        ledger.release_sequence(released)
        clock.append(time.perf_counter())
        chosen = queue.choose()
        if chosen is not None:
            reserve(ledger, *chosen)
        clock.append(time.perf_counter())
        queue.policy.moves(ledger, [])
        clock.append(time.perf_counter())
        for kind, start, end in zip(("release", "decision", "moves"), clock, clock[1:], strict=False):
            seconds[kind].append(end - start)
        if chosen is not None:
            numbers.append(chosen[0].sequence)
    found: dict[str, Any] = {"ledger_bytes_per_request": memory / live}
    for kind, values in seconds.items():
        found[f"{kind}_us"] = {f"p{share}": float(np.percentile(values, share) * 1e6) for share in (50, 99)}
    return found


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--workers", type=int, nargs="+", default=[32, 1000, 10_000])
    arguments.add_argument("--requests", type=int, default=100_000)
    arguments.add_argument("--rounds", type=int, default=3000)
    arguments.add_argument("--policies", nargs="+", default=["overflow", "greedy", "best"])
    given = arguments.parse_args()
    figures = {
        f"{policy}, {workers} workers": measure(policy, workers, given.requests, given.rounds)
        for policy in given.policies
        for workers in given.workers
    }
    report(figures, {"requests": given.requests, "rounds": given.rounds}, given.json)


if __name__ == "__main__":
    main()
