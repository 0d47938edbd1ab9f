"""How much memory do weights take on one machine, with one worker and several, as stored and converted?

The checkpoint is SmolLM2-135M in bfloat16. The figure is the proportional set size (PSS) of the memory that holds
weights: a page that several processes map is divided among them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import torch
from _report import parser, report
from distributed import Client, LocalCluster, Worker

from distkv_dask import Engine
from distkv_dask.models.gguf_cache import converted_weights
from distkv_dask.models.source import resolve_model


def weight_memory(engine: str, dask_worker: Worker) -> tuple[int, int]:
    """Bytes (PSS) of memory that holds an engine's weights on this worker, and of the whole process (RSS)."""
    weights = list(dask_worker.plugins["distkv"].engines[engine].model._model.parameters())
    with torch.inference_mode():
        for weight in weights:
            weight.view(torch.uint8).sum()  # maps its pages
    process, found = psutil.Process(), 0
    for part in process.memory_maps(grouped=False):
        start, stop = (int(one, 16) for one in part.addr.split("-"))
        if any(start <= weight.data_ptr() < stop for weight in weights):
            found += part.pss
    return found, process.memory_info().rss


def of_workers(count: int, folder: Path, dtype: str) -> dict[str, Any]:
    """Figures of a cluster of ``count`` workers."""
    with (
        LocalCluster(n_workers=count, threads_per_worker=1, dashboard_address=None, memory_limit=0) as cluster,
        Client(cluster) as client,
        Engine(client, str(folder), dtype=dtype, kv_memory="64 MiB") as engine,
    ):
        client.run(weight_memory, engine.id)
        found = client.run(weight_memory, engine.id).values()
        workers = engine.status().workers.values()
        return {
            "weights_pss": sum(pss for pss, _ in found),
            "rss_of_a_worker": max(rss for _, rss in found),
            "weights": sorted({worker.weights for worker in workers}),
        }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--workers", type=int, default=2, help="number of workers")
    options = arguments.parse_args()
    folder = converted_weights(Path(resolve_model("smollm2-135m").location), "bfloat16")
    figures: dict[str, Any] = {}
    for dtype in ("bfloat16", "float32"):
        one, several = (of_workers(count, folder, dtype) for count in (1, options.workers))
        figures[dtype] = {"one": one, "several": several, "ratio": several["weights_pss"] / one["weights_pss"]}
    report(figures, {"workers": options.workers}, options.json)


if __name__ == "__main__":
    main()
