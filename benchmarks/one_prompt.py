"""How long does a document of about 6,000 tokens take to its first token with one worker, and with all at once?

Both modes take turns in one run, on the same workers of one thread each. On a busy machine, wall time says less than
the processor time of the worker that used most of it: the time that would remain if each worker had its own core.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from statistics import median

from _report import parser, report
from distributed import Client, LocalCluster
from eight_documents import TOKENS, documents

from distkv_dask import Engine, SamplingParams

FIRST = SamplingParams(max_new_tokens=1, ignore_eos=True)


def turn(client: Client, engine: Engine, prompt: list[int]) -> tuple[float, float, float]:
    """Seconds to the first token, and processor seconds of the worker that used most, and of all workers."""
    before, began = client.run(time.process_time), time.perf_counter()
    done = engine.generate([prompt], FIRST)[0]
    seconds, after = time.perf_counter() - began, client.run(time.process_time)
    assert done.reused_tokens == 0
    used = [after[worker] - before[worker] for worker in before]
    return seconds, max(used), sum(used)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--turns", type=int, default=3)
    arguments.add_argument("--tokens", type=int, default=TOKENS)
    arguments.add_argument("--dtype", default="bfloat16")
    arguments.add_argument("--model", default="smollm2-135m")
    options = arguments.parse_args()
    settings = {"dtype": options.dtype, "kv_memory": "256 MiB", "prefix_cache": False}
    figures: dict[str, object] = {"load_before": os.getloadavg()[0]}
    with (
        LocalCluster(n_workers=options.workers, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
        ExitStack() as engines,
    ):
        ways = {
            count: engines.enter_context(Engine(client, options.model, prefill_workers=count, **settings))
            for count in (1, options.workers)
        }
        prompt = documents(ways[1], 1)[0][: options.tokens]
        for engine in ways.values():
            engine.generate([prompt[:1200]], FIRST)  # warm-up
        turns = {count: list[tuple[float, float, float]]() for count in ways}
        for _ in range(options.turns):
            for count, engine in ways.items():
                turns[count].append(turn(client, engine, prompt))
        spread = ways[options.workers].status().totals["wavefront_events"]
    for count, some in turns.items():
        seconds, most, every = (median(column) for column in zip(*some, strict=True))
        figures |= {
            f"first_token_seconds_{count}": seconds,
            f"busiest_cpu_seconds_{count}": most,
            f"all_cpu_seconds_{count}": every,
            f"turns_{count}": [[round(value, 2) for value in one] for one in some],
        }
    for name in ("first_token_seconds", "busiest_cpu_seconds"):
        figures[f"{name}_ratio"] = median(
            one[name == "busiest_cpu_seconds"] / other[name == "busiest_cpu_seconds"]
            for one, other in zip(turns[1], turns[options.workers], strict=True)
        )
    figures |= {"prompts_spread": spread, "load_after": os.getloadavg()[0]}
    configuration = {name: value for name, value in vars(options).items() if name != "json"}
    report(figures, configuration, options.json)


if __name__ == "__main__":
    main()
