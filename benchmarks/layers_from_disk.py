"""What layers from disk cost: prefill by length of a prompt and decoding by batch, beside weights in memory.

SmolLM2-135M on one worker. Engines of both kinds take turns in one process tree; figures are medians over the turns.
The page cache is warm: the file fits memory and was read just before, so this is the cost of copying, not of a disk.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from _report import parser, report
from distributed import Client, LocalCluster

from distkv_dask import Engine
from distkv_dask.client.bench import decodes, prefills
from distkv_dask.models.gguf_cache import converted_weights
from distkv_dask.models.source import resolve_model


def measure(client: Client, folder: Path, weights: str, options: Any) -> tuple[dict[str, float], str]:
    """Tokens per second of one turn, by what was measured; where the weights were."""
    settings = {"dtype": options.dtype, "kv_memory": "512 MiB", "prefix_cache": False, "weights": weights}
    with Engine(client, str(folder), **settings) as engine:
        found = {f"prefill {one.prompt_tokens}": one.tokens_per_second for one in prefills(engine, options.prompts)}
        decoded = decodes(engine, options.batches, options.new)
        found |= {f"decode {one.batch}": one.tokens_per_second for one in decoded}
        return found, next(iter(engine.status().workers.values())).weights


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the model")
    arguments.add_argument("--prompts", type=int, nargs="+", default=[512, 1024], help="lengths, in tokens")
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 64], help="requests that decode together")
    arguments.add_argument("--threads", type=int, default=1, help="of the worker")
    arguments.add_argument("--new", type=int, default=24, help="new tokens of each request")
    arguments.add_argument("--turns", type=int, default=3, help="of each")
    options = arguments.parse_args()
    folder = converted_weights(Path(resolve_model("smollm2-135m").location), options.dtype)
    turns: dict[str, list[dict[str, float]]] = {"memory": [], "disk": []}
    where = {}
    with (
        LocalCluster(n_workers=1, threads_per_worker=options.threads, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        for number in range(options.turns):
            for weights in ("memory", "disk") if number % 2 == 0 else ("disk", "memory"):
                found, where[weights] = measure(client, folder, weights, options)
                turns[weights].append(found)
    figures: dict[str, Any] = {"weights": where}
    for name in turns["memory"][0]:
        memory, disk = (statistics.median(turn[name] for turn in turns[way]) for way in ("memory", "disk"))
        figures[name] = {"memory": memory, "disk": disk, "of_memory": disk / memory}
    named = {name: getattr(options, name) for name in ("dtype", "prompts", "batches", "threads", "new", "turns")}
    report(figures, named, options.json)


if __name__ == "__main__":
    main()
