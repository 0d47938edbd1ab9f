"""The number of stages of an engine with ``distkv.stages: auto``: the fewest workers among which the layers fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from distkv_dask.messages.names import MEMORY_RESOURCE, PAUSE_FRACTION
from distkv_dask.models.source import ModelSource
from distkv_dask.models.weight_sizes import kv_beside
from distkv_dask.placement import Stage

BARE, IMPORTED = 300 << 20, 600 << 20
"""Bytes of a worker's process: at most, before it has imported what any engine needs, and about, once it has."""


class WorkerMemory(NamedTuple):
    """Memory of a worker: its limit in bytes, 0 without one, and what its process takes now."""

    limit: int
    resident: int

    def has_room(self, weights: int, kv_memory: int | None) -> bool:
        """Whether weights fit beside KV memory: as configured, or else what a worker has by default."""
        kv = kv_beside(weights, self.limit) if kv_memory is None else kv_memory
        resident = self.resident if self.resident > BARE else IMPORTED
        return not self.limit or weights + kv + resident <= PAUSE_FRACTION * self.limit


def memories(workers: Mapping[str, Mapping[str, Any]]) -> list[WorkerMemory]:
    """Memory of the workers that may load a model, from the scheduler's description of all."""
    return [
        WorkerMemory(int(one["memory_limit"] or 0), int(one["metrics"].get("memory", 0)))
        for one in workers.values()
        if MEMORY_RESOURCE not in one["resources"]
    ]


def stage_count(source: ModelSource, dtype: str, workers: Sequence[WorkerMemory], kv_memory: int | None) -> int:
    """Fewest workers whose memory has room for a model's weights and the KV memory.

    Parameters
    ----------
    source, dtype
        The model, and the dtype of its weights.
    workers
        Those that may load it.
    kv_memory
        As configured, in bytes.

    Returns
    -------
    int
        1 also if they are too few, or nothing is known of the weights before they are loaded: then each worker says
        what is missing, or reads layers from disk.
    """
    config = source.config()
    layers = config.get_text_config().num_hidden_layers
    roomy = sorted(workers, key=lambda one: one.limit * PAUSE_FRACTION - one.resident if one.limit else float("inf"))
    for count in range(1, min(len(workers), layers) + 1):
        sizes = _sizes(source, config, dtype, count, layers)
        if sizes is None:
            return 1
        if all(one.has_room(max(sizes), kv_memory) for one in roomy[-count:]):
            return count
    return 1


def _sizes(source: ModelSource, config: Any, dtype: str, count: int, layers: int) -> list[int] | None:
    """Bytes of each stage's weights, None if that is not known or they cannot be divided."""
    if count == 1:
        whole = source.weight_bytes(config, dtype)
        return None if whole is None else [whole]
    stages = (Stage(number, count) for number in range(count))
    sizes = [source.stage_memory(config, dtype, one.layers(layers), not one.number)[0] for one in stages]
    known = [size for size in sizes if size is not None]
    return known if len(known) == count else None
