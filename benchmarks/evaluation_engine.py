"""How long do one long request and many short ones take together on the real engine, by policy?

Two mixes on three workers: with a long request that just fits on one worker, and with one that fits on none, which
`local-only` has to refuse. All requests arrive at once, the long one in the middle; their lengths vary, and not all
fit into memory at the same time. Policies take turns on one cluster.
"""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

from _report import parser, report
from distributed import Client, LocalCluster

from distkv_dask import Engine, SamplingParams

BLOCK = 64
POLICIES = ("local-only", "single", "overflow", "best")


def mix(options: Any, long: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of random tokens, and the number of answer tokens of each."""
    rng = random.Random(0)
    lengths = [
        (rng.randint(options.short // 2, options.short * 3 // 2), rng.randint(8, 2 * options.short_new - 8))
        for _ in range(options.shorts)
    ]
    lengths.insert(options.shorts // 2, (long, options.long_new))
    return [
        ([rng.randrange(1000, 40_000) for _ in range(prompt)], SamplingParams(max_new_tokens=new, ignore_eos=True))
        for prompt, new in lengths
    ]


def serve(client: Client, policy: str, memory: int, requests: list[Any]) -> dict[str, Any]:
    """Wall time of all requests, and their outcomes."""
    with Engine(client, "smollm2-135m", kv_memory=memory, policy=policy, prefix_cache=False) as engine:
        engine.generate([[1] * 64] * 3, SamplingParams(max_new_tokens=4, ignore_eos=True))  # warm-up of all workers
        began = time.perf_counter()
        done = engine.generate([prompt for prompt, _ in requests], [sampling for _, sampling in requests])
        seconds = time.perf_counter() - began
        totals = engine.status().totals
    served = [one for one in done if one.error is None]
    return {
        "seconds": seconds,
        "new_tokens_per_second": sum(len(one.token_ids) for one in served) / seconds,
        "tokens_per_second": sum(len(one.token_ids) + one.prompt_tokens for one in served) / seconds,
        "refused": len(done) - len(served),
        "median_seconds_of_a_request": statistics.median(
            one.timings.queued + one.timings.prefill + one.timings.decode for one in served
        ),
        "workers_of_the_long_request": len({span.worker for span in done[len(done) // 2].placement}),
        "moved_blocks": totals["moved_blocks"],
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--blocks", type=int, default=40, help="KV blocks of 64 tokens on each worker")
    arguments.add_argument("--shorts", type=int, default=60, help="how many short requests")
    arguments.add_argument("--short", type=int, default=192, help="average tokens of a short prompt")
    arguments.add_argument("--short-new", type=int, default=48, help="average tokens of its answer")
    arguments.add_argument("--long-new", type=int, default=64)
    arguments.add_argument("--repeat", type=int, default=1)
    arguments.add_argument("--policies", nargs="+", default=list(POLICIES), choices=POLICIES)
    options = arguments.parse_args()
    room = options.blocks * BLOCK
    mixes = {"fits on one worker": room - options.long_new - BLOCK, "fits on none": room * 3 // 2}
    rows: dict[str, list[dict[str, Any]]] = {}
    with (
        LocalCluster(n_workers=3, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        with Engine(client, "smollm2-135m", kv_memory=room * 23_040):
            pass  # so that the weights are loaded and the workers timed
        for name, long in mixes.items():
            for _ in range(options.repeat):
                for policy in options.policies:
                    row = serve(client, policy, room * 23_040, mix(options, long))
                    rows.setdefault(f"{name}: {policy}", []).append(row)
                    print(name, policy, {key: round(value, 2) for key, value in row.items()}, flush=True)
    figures = {
        name: {key: statistics.median(one[key] for one in found) for key in found[0]} for name, found in rows.items()
    }
    shape = {name: value for name, value in vars(options).items() if name != "json"}
    report({"results": figures}, shape | {"long": mixes, "block_tokens": BLOCK}, options.json)


if __name__ == "__main__":
    main()
