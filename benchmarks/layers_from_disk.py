"""What do layers from disk cost in prefill chunks and decode steps, compared with weights in memory?

SmolLM2-135M. Both models are in one process and take turns; figures are medians over the turns. Attention takes the
same time with both and is left out. The page cache is warm, because the file was read just before: the figures show
the cost of copying layers while others compute, not the cost of a disk.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from _report import parser, report

from distkv_dask.models.gguf_cache import converted_weights
from distkv_dask.models.source import resolve_model
from distkv_dask.worker.model.load import load_model
from distkv_dask.worker.model.loaded import LoadedModel
from distkv_dask.worker.model.no_attention import NoAttention
from distkv_dask.worker.timing.linear_choice import chosen


def seconds(model: LoadedModel, tokens: int, keep: int) -> float:
    """Seconds of a forward over some tokens, with logits for the last ``keep``."""
    began = time.perf_counter()
    attention = NoAttention(model.geometry.value_dim)
    model.forward(torch.arange(tokens), torch.arange(tokens), attention, torch.arange(tokens - keep, tokens))
    return time.perf_counter() - began


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="dtype of the model")
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--turns", type=int, default=9)
    options = arguments.parse_args()
    folder = str(converted_weights(Path(resolve_model("smollm2-135m").location), options.dtype))
    models = {"memory": load_model(folder, options.dtype, options.threads)}
    models["disk"] = load_model(folder, options.dtype, options.threads, from_disk=True)
    models["memory"].pack(1 << 40, 512, chosen)  # as an engine does if that takes little of a worker's memory
    figures: dict[str, Any] = {"weights": {name: model.where for name, model in models.items()}}
    for name, tokens, keep in (("prefill 512", 512, 1), ("decode 64", 64, 64), ("decode 1", 1, 1)):
        turns: dict[str, list[float]] = {kind: [] for kind in models}
        for turn in range(options.turns + 1):
            for kind in sorted(models, reverse=turn % 2 == 0):
                turns[kind].append(seconds(models[kind], tokens, keep))
        memory, disk = (statistics.median(turns[kind][1:]) for kind in ("memory", "disk"))
        figures[name] = {"memory_ms": 1e3 * memory, "disk_ms": 1e3 * disk, "speed_of_memory": memory / disk}
    report(figures, {name: getattr(options, name) for name in ("dtype", "threads", "turns")}, options.json)


if __name__ == "__main__":
    main()
