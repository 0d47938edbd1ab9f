"""What does ``distkv.deterministic`` cost, for prefill by prompt length and for decoding by batch size?

SmolLM2-135M on one worker. Engines with and without it take turns on one cluster; figures are medians over the turns.
"""

from __future__ import annotations

import statistics
from typing import Any

from _report import parser, report
from distributed import Client, LocalCluster

from distkv_dask import Engine
from distkv_dask.client.bench import decodes, prefills

PROMPTS = (256, 1024, 3072)
BATCHES = (1, 3, 4, 16, 64)


def measure(client: Client, deterministic: bool, settings: dict[str, Any], new: int) -> dict[str, float]:
    """Tokens per second of one turn, by measurement."""
    with Engine(client, "smollm2-135m", deterministic=deterministic, **settings) as engine:
        found = {f"prefill {one.prompt_tokens}": one.tokens_per_second for one in prefills(engine, PROMPTS)}
        return found | {f"decode {one.batch}": one.tokens_per_second for one in decodes(engine, BATCHES, new)}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="dtype of the model")
    arguments.add_argument("--threads", type=int, default=1, help="threads of the worker")
    arguments.add_argument("--new", type=int, default=48, help="new tokens of each request")
    arguments.add_argument("--turns", type=int, default=3, help="turns of each engine")
    options = arguments.parse_args()
    settings = {"dtype": options.dtype, "kv_memory": "512 MiB", "prefix_cache": False}
    turns: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    with (
        LocalCluster(n_workers=1, threads_per_worker=options.threads, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        for number in range(options.turns):
            for deterministic in (False, True) if number % 2 == 0 else (True, False):
                turns[deterministic].append(measure(client, deterministic, settings, options.new))
    figures: dict[str, Any] = {}
    for name in turns[False][0]:
        without, with_it = (statistics.median(turn[name] for turn in turns[way]) for way in (False, True))
        figures[name] = {"without": without, "with": with_it, "times_slower": without / with_it}
    named = {name: getattr(options, name) for name in ("dtype", "threads", "new", "turns")}
    report(figures, named, options.json)


if __name__ == "__main__":
    main()
