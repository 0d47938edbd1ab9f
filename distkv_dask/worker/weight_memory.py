"""Whether a model's weights fit a worker, asked before they are loaded: too late, and Dask kills the worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil
from distributed.system import MEMORY_LIMIT

from distkv_dask.errors import CapacityError, DeviceError
from distkv_dask.messages.names import KV_MEMORY_RESOURCE, PAUSE_FRACTION, EngineSpec
from distkv_dask.models.source import resolve_model
from distkv_dask.models.support import check_supported
from distkv_dask.models.weight_sizes import kv_beside
from distkv_dask.worker.device import Device

SHARED = (
    "which may add up to more than the machine has: workers of a machine share weights, but Dask counts them in each "
    "(distkv models check --workers N says the limit of N workers)"
)

if TYPE_CHECKING:
    from distributed import Worker


def check_weights_fit(spec: EngineSpec, worker: Worker, device: Device) -> None:
    """Refuse a model whose weights do not fit where they would go, with the KV memory that is asked for.

    Raises
    ------
    ModelError, UnsupportedModelError
        The model cannot be served, whatever there is of memory.
    CapacityError, DeviceError
        Naming what they need and what there is, in bytes.
    """
    source = resolve_model(spec.model, spec.rope_scaling)
    check_supported(config := source.config())
    if (weights := source.weight_bytes(config, spec.dtype)) is None:
        return
    need = f"need {weights} bytes (dtype {spec.dtype})"
    if not device.is_host:
        free, total = device.memory()
        if weights > free:
            raise DeviceError(
                f"the weights of model {source.name!r} {need}, but {device.name} has {free} of {total} bytes free: "
                "choose a smaller model or dtype, or a larger card"
            )
        return
    free = free_memory()
    limit = worker.memory_manager.memory_limit
    asked = _asked(spec, worker, weights, limit or free)
    if weights + asked > free:
        raise CapacityError(
            f"model {source.name!r} does not fit the machine of worker {worker.address}: its weights {need}, which all "
            f"workers of the machine share, and kv_memory is {asked}, but {free} bytes are available. Lower kv_memory "
            "(distkv.kv-memory), choose a smaller model or dtype, or a larger machine"
        )
    if not limit:
        return
    resident = psutil.Process().memory_info().rss
    left = int(PAUSE_FRACTION * limit) - resident
    if weights + asked <= left:
        return
    there = (
        f"{max(0, left)} bytes are left of its memory limit of {limit}, since Dask pauses it above "
        f"{PAUSE_FRACTION:.0%} and its process holds {resident}"
    )
    least = int((weights + asked + resident) / PAUSE_FRACTION)
    if weights >= left:
        raise CapacityError(
            f"model {source.name!r} does not fit worker {worker.address}: its weights {need}, but {there}. Start "
            f"workers with a memory_limit of at least {least} bytes, {SHARED}, or choose a smaller model or dtype"
        )
    raise CapacityError(
        f"kv_memory of {asked} bytes does not fit worker {worker.address} beside the weights of model {source.name!r}, "
        f"which {need}: {there}. Lower kv_memory (distkv.kv-memory) to at most {left - weights} bytes, or raise the "
        f"worker's memory_limit to at least {least}, {SHARED}"
    )


def free_memory() -> int:
    """Bytes that this machine has for more: pages of files that can be read again, such as weights, count as free."""
    return min(psutil.virtual_memory().available, MEMORY_LIMIT)


def _asked(spec: EngineSpec, worker: Worker, weights: int, limit: int) -> int:
    """Bytes of KV memory that the worker will have, as :mod:`distkv_dask.worker.kv_memory` sees it."""
    resources = worker.state.total_resources
    if KV_MEMORY_RESOURCE in resources:
        return int(resources[KV_MEMORY_RESOURCE])
    return kv_beside(weights, limit) if spec.config.kv_memory is None else spec.config.kv_memory
