"""Checks whether a model's weights fit a worker before they are loaded; otherwise Dask would kill the worker."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import psutil
from distributed.system import MEMORY_LIMIT

from distkv_dask.errors import CapacityError, DeviceError, ModelError
from distkv_dask.messages.names import KV_MEMORY_RESOURCE, PAUSE_FRACTION, EngineSpec
from distkv_dask.models.source import ModelSource, resolve_model
from distkv_dask.models.support import check_supported
from distkv_dask.models.weight_sizes import kv_beside
from distkv_dask.placement import Stage
from distkv_dask.worker.device import Device

if TYPE_CHECKING:
    from distributed import Worker

logger = logging.getLogger("distributed.distkv.opening")

SHARED = (
    "which may add up to more than the machine has: workers of a machine share weights, but Dask counts them in each "
    "(distkv models check --workers N says the limit of N workers)"
)


def is_from_disk(spec: EngineSpec, worker: Worker, device: Device, stage: Stage | None = None) -> bool:
    """Whether to read a model's layers from disk; refuses weights that do not fit with the configured KV memory.

    Raises
    ------
    ModelError, UnsupportedModelError
        The model cannot be served, with any amount of memory.
    CapacityError, DeviceError
        With the bytes needed and available.
    """
    source = resolve_model(spec.model, spec.rope_scaling)
    check_supported(config := source.config())
    weights, setting = source.weight_bytes(config, spec.dtype), spec.config.weights
    if stage is not None:
        _check_stage(spec, worker, device, source, stage)
        return False
    if not device.is_host:
        _check_card(device, source.name, weights, spec)
        return False
    if weights is None:
        return setting == "disk"
    need: int | None = weights
    from_disk = setting == "disk" or (setting == "auto" and weights >= min(free_memory(), until_paused(worker)))
    if from_disk:
        need = source.disk_memory(config, spec.dtype)
        if need is None and setting == "auto":
            need, from_disk = weights, False
    if need is not None:
        on_disk = f", layers on disk, of {weights}" if from_disk else ""
        _check_fit(spec, worker, need, f"model {source.name!r}", f"need {need} bytes (dtype {spec.dtype}{on_disk})")
    if from_disk:
        logger.warning(
            "worker %s reads layers of model %r from disk (distkv.weights: %s): in memory its weights need %d bytes",
            *(worker.address, source.name, setting, weights),
        )
    return from_disk


def _check_stage(spec: EngineSpec, worker: Worker, device: Device, source: ModelSource, stage: Stage) -> None:
    """Refuse a stage whose layers do not fit; weights of other layers are mapped, too, but never read."""
    if not device.is_host:
        raise DeviceError(
            f"distkv.stages is {stage.count}, but layers can be on several workers only without cards (this one has "
            f"{device.name}): set distkv.device to cpu, or distkv.stages to 1"
        )
    config = source.config()
    count = config.get_text_config().num_hidden_layers
    need, known = source.stage_memory(config, spec.dtype, stage.layers(count), not stage.number)
    if need is not None:
        what = f"layers {stage.layers(count)[0]} to {stage.layers(count)[1] - 1} of model {source.name!r}"
        _check_fit(spec, worker, need, what, f"need {need} bytes (dtype {spec.dtype}), one of {stage.count} stages")
    elif known:
        raise ModelError(
            f"distkv.stages is {stage.count}, but the weights of model {source.name!r} would be converted, for which "
            "one worker needs all of them in memory: set dtype to auto, or save the model in the dtype that you want"
        )


def _check_card(device: Device, name: str, weights: int | None, spec: EngineSpec) -> None:
    if spec.config.weights == "disk":
        raise DeviceError(
            f"distkv.weights is disk, but weights of a worker with a card ({device.name}) are in its memory: set "
            "distkv.weights to auto, or distkv.device to cpu"
        )
    free, total = device.memory()
    if weights is not None and weights > free:
        raise DeviceError(
            f"the weights of model {name!r} need {weights} bytes (dtype {spec.dtype}), but {device.name} has {free} of "
            f"{total} bytes free: choose a smaller model or dtype, or a larger card"
        )


def _check_fit(spec: EngineSpec, worker: Worker, weights: int, model: str, need: str) -> None:
    """Refuse weights that do not fit the machine or Dask's limit with the KV memory; ``need`` is for the message."""
    free, limit = free_memory(), worker.memory_manager.memory_limit
    asked = _asked(spec, worker, weights, limit or free)
    if weights + asked > free:
        raise CapacityError(
            f"{model} does not fit the machine of worker {worker.address}: its weights {need}, which all workers of "
            f"the machine share, and kv_memory is {asked}, but {free} bytes are available. Lower kv_memory "
            "(distkv.kv-memory), choose a smaller model or dtype, or a larger machine"
        )
    if not limit or weights + asked <= (left := until_paused(worker)):
        return
    resident = psutil.Process().memory_info().rss
    there = (
        f"{max(0, left)} bytes are left of its memory limit of {limit}, since Dask pauses it above "
        f"{PAUSE_FRACTION:.0%} and its process holds {resident}"
    )
    least = int((weights + asked + resident) / PAUSE_FRACTION)
    if weights >= left:
        raise CapacityError(
            f"{model} does not fit worker {worker.address}: its weights {need}, but {there}. Start workers with a "
            f"memory_limit of at least {least} bytes, {SHARED}, or choose a smaller model or dtype"
        )
    raise CapacityError(
        f"kv_memory of {asked} bytes does not fit worker {worker.address} in addition to the weights of {model}, which "
        f"{need}: {there}. Lower kv_memory (distkv.kv-memory) to at most {left - weights} bytes, raise the worker's "
        f"memory_limit to at least {least}, {SHARED}, or set distkv.weights to disk"
    )


def until_paused(worker: Worker) -> float:
    """Bytes until Dask pauses a worker."""
    limit = worker.memory_manager.memory_limit
    return int(PAUSE_FRACTION * limit) - psutil.Process().memory_info().rss if limit else math.inf


def free_memory() -> int:
    """Available bytes of this machine: pages of files that can be read again, such as weights, count as free."""
    return min(psutil.virtual_memory().available, MEMORY_LIMIT)


def _asked(spec: EngineSpec, worker: Worker, weights: int, limit: int) -> int:
    """Bytes of KV memory that the worker will have by the rules of :mod:`distkv_dask.worker.kv_memory`."""
    resources = worker.state.total_resources
    if KV_MEMORY_RESOURCE in resources:
        return int(resources[KV_MEMORY_RESOURCE])
    return kv_beside(weights, limit) if spec.config.kv_memory is None else spec.config.kv_memory
