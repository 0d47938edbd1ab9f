"""Startup of an engine on a worker: load the model, then allocate a pool that fits next to it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from distkv_dask.errors import DeviceError, UnsupportedModelError
from distkv_dask.geometry import Geometry, Measurement
from distkv_dask.kernels import make_ready, micro_attention
from distkv_dask.messages.from_worker import FromWorker, Opened
from distkv_dask.messages.names import EngineSpec
from distkv_dask.placement import Stage
from distkv_dask.worker.blocks.files import BlockFiles
from distkv_dask.worker.blocks.pool import BlockShape, Pool
from distkv_dask.worker.blocks.spilled import Spilled
from distkv_dask.worker.device import Device
from distkv_dask.worker.device_choice import choose_device
from distkv_dask.worker.engine import WorkerEngine
from distkv_dask.worker.heap import keep_freed_memory
from distkv_dask.worker.home.home_files import HomeFiles
from distkv_dask.worker.home.windows import Windows, new_windows
from distkv_dask.worker.kv_memory import Needs, adapter_room, host_memory, kv_memory, needs_of, rooms
from distkv_dask.worker.lanes import Lanes
from distkv_dask.worker.runtime import Runtime
from distkv_dask.worker.stages.blocks import NamedBlocks
from distkv_dask.worker.timing.kernel_choice import choose_kernels
from distkv_dask.worker.timing.measurement import BATCH, FORM, LONGEST, measure
from distkv_dask.worker.timing.measurement_cache import cached_measurement, hardware
from distkv_dask.worker.weight_memory import is_from_disk

if TYPE_CHECKING:
    from distributed import Worker

    from distkv_dask.worker.model.loaded import LoadedModel

logger = logging.getLogger("distributed.distkv.opening")


def build_engine(
    spec: EngineSpec,
    geometry: Geometry | None,
    lanes: Lanes,
    worker: Worker,
    tell: Callable[[str, FromWorker], None],
    stage: Stage | None = None,
) -> WorkerEngine:
    """Load the model and allocate the pool of an engine on a worker; blocks for seconds.

    A memory worker gets the model's ``geometry`` instead, and needs no model. If layers are on several workers, this
    one has those of its ``stage``.

    Raises
    ------
    ModelError, UnsupportedModelError
        The model cannot be loaded or served.
    CapacityError, ConfigError
        KV memory is too small for a block or does not fit the worker.
    """
    keep_freed_memory()
    device = _device(spec, worker)
    model = _model(spec, worker, lanes, device, stage) if geometry is None else None
    if geometry is None:
        assert model is not None
        geometry = model.geometry
    if geometry.scan_once and spec.config.granularity == "layer":
        raise UnsupportedModelError(
            "the recurrent layers of this model continue from a state token by token, which tasks by layer cannot: set "
            "distkv.granularity to window"
        )
    pool, windows, places = _pools(spec, worker, geometry, device, model, stage)
    if model is not None:
        model.adapters.limit = max(model.adapters.limit, spec.config.adapters)
        model.adapters.room = adapter_room(worker, device, pool.capacity_blocks * pool.block_bytes)
    kernels = choose_kernels(pool, spec.config)
    runtime = Runtime(spec, model, pool, lanes, windows)
    if stage is not None and model is not None and not stage.number:
        runtime.link_stages(stage, model.whole)
    report = partial(tell, spec.engine)
    files = _files(runtime, model, worker, report)
    facts = Opened(
        worker.address,
        lanes.endpoint,
        role="memory" if model is None else "stage" if isinstance(pool, NamedBlocks) else "instance",
        channels=runtime.dialer.explain(),
        device=": ".join(filter(None, (device.name, device.note, _launches(model, device)))),
        capacity_blocks=pool.capacity_blocks,
        block_bytes=pool.block_bytes,
        spill_bytes=files.spilled.disk_bytes,
        host_bytes=files.spilled.host_bytes,
        places=places,
        geometry=geometry,
        fingerprint="" if model is None else model.fingerprint,
        measured=_timings(runtime, geometry, model, kernels.name) if stage is None else None,
        kernels=f"{kernels.name}: {kernels.reason}",
        weights="" if model is None else model.where + _layers(stage, model),
    )
    return WorkerEngine(runtime, model, files, facts, report)


def _model(spec: EngineSpec, worker: Worker, lanes: Lanes, device: Device, stage: Stage | None) -> LoadedModel:
    # takes seconds and memory, so memory workers do not import it
    from distkv_dask.worker.model.packed import packing_room
    from distkv_dask.worker.model.packed_file import usual_rows
    from distkv_dask.worker.model.shared import shared_model
    from distkv_dask.worker.timing.linear_choice import chosen

    config = spec.config
    model = shared_model(
        *(spec.model, spec.dtype, lanes.threads, spec.rope_scaling, config.deterministic, device, config.weights),
        place=partial(is_from_disk, spec, worker, device, stage),
        stage=stage,
    )
    if not config.cuda_graphs:
        model.uncaptured = "distkv.cuda-graphs is false"
    if device.is_host and not config.deterministic:
        model.pack(packing_room(worker.memory_manager.memory_limit), usual_rows(config), chosen)
    return model


def _pools(
    spec: EngineSpec, worker: Worker, geometry: Geometry, device: Device, model: LoadedModel | None, stage: Stage | None
) -> tuple[Pool, Windows | None, int]:
    """Memory for KV: blocks, at most as many as further stages can have, windows of layers, places for sequences."""
    block = BlockShape.of(geometry, spec.config.block_tokens)
    memory = kv_memory(spec, worker, block, device, model)
    needs = Needs() if model is None else needs_of(geometry, spec.config)
    blocks, places = rooms(memory, block, needs, spec.config.window_batch)
    if stage is not None:
        blocks = min(blocks, stage.blocks or blocks)
    is_further = stage is not None and stage.number > 0
    pool = NamedBlocks(block, blocks, device) if is_further else Pool(block, blocks, device)
    windows = new_windows(geometry, spec.config, worker.address, places, device) if needs.once else None
    for each in (pool, *((windows.pool,) if windows is not None else ())):
        check_kernels(each, geometry.heads)
        for some, soft_cap in {(kind.visible != "full", kind.soft_cap) for kind in each.layer_kinds}:
            make_ready(each.keys(0), each.values(0), geometry.heads, windows=some, soft_cap=soft_cap)
    return pool, windows, places


def _files(
    runtime: Runtime, model: LoadedModel | None, worker: Worker, report: Callable[[FromWorker], None]
) -> BlockFiles:
    """Saves and spills the blocks of an engine and, with a model, the states that homes keep."""
    spec, device = runtime.spec, runtime.pool.device
    folder = Path(worker.local_directory) / f"distkv-{spec.engine}"
    config = spec.config if model is None or model.stage is None else replace(spec.config, spill=0)
    spilled = Spilled(runtime.pool, folder, config, host_memory(spec, worker, device))
    home = None
    if model is not None and model.geometry.home_bytes:
        home = HomeFiles(runtime.home_state, model.state_of_a_token(), device)
    return BlockFiles(worker.address, spilled, spec.config, report, home)


def _layers(stage: Stage | None, model: LoadedModel) -> str:
    """Which layers are here, and which on other workers; empty if all are here."""
    if stage is None:
        return ""
    runs = [Stage(number, stage.count).layers(model.whole.layers) for number in range(stage.count)]
    first, stop = runs[stage.number]
    said = [f"layers {first} to {stop - 1} of {model.whole.layers}"]
    for (first, stop), endpoint in zip(runs[1:], stage.further, strict=False):
        said.append(f"{first} to {stop - 1} on {endpoint.worker}")
    return "; " + ", ".join(said)


def _launches(model: LoadedModel | None, device: Device) -> str:
    """A note for the user on decode steps without CUDA graphs, or empty."""
    if model is None or device.is_host or not model.uncaptured:
        return ""
    return f"decode steps are launched by Python, not as CUDA graphs: {model.uncaptured}"


def check_kernels(pool: Pool, heads: int) -> None:
    """Try the kernels with a query over no tokens of a pool, before the first request.

    Parameters
    ----------
    pool
        The engine's.
    heads
        Query heads of the model.

    Raises
    ------
    UnsupportedModelError
        Its heads have numbers or sizes that kernels do not take.
    """
    k_pool, none = pool.keys(0), torch.zeros(1, dtype=torch.int32, device=pool.device.torch)
    q = k_pool.new_zeros(1, heads, k_pool.shape[3])
    try:
        micro_attention(q, k_pool, pool.values(0), none[None], none, scale=1.0)
    except (TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"the model has heads that kernels do not take: {error}. Choose a model whose heads have a multiple of 8 "
            "numbers"
        ) from error


def _timings(runtime: Runtime, geometry: Geometry, model: LoadedModel | None, kernels: str) -> Measurement | None:
    """Timings of the worker with the model: from an earlier start, or measured now."""
    spec, lanes, blocks = runtime.spec, runtime.lanes, runtime.pool.capacity_blocks
    key = {
        "form": FORM,
        **asdict(geometry),
        "role": "memory" if model is None else "instance",
        "weights": 0 if model is None else model.parameters,
        "packed": model is not None and model.is_packed,
        "threads": lanes.threads,
        "deterministic": spec.config.deterministic,
        "block_tokens": spec.config.block_tokens,
        "blocks": min(blocks, LONGEST // spec.config.block_tokens + 2 * BATCH),  # more would change nothing
        "channel": runtime.dialer.explain(),
        "kernels": kernels,
        **hardware(runtime.pool.device.name),
    }
    if model is not None and model.weights.disk is not None:
        key["layers"] = "from disk"
    timing = partial(measure, spec.engine, geometry, runtime, lanes, has_model=model is not None)
    return cached_measurement(key, spec.config.performance, timing)


def _device(spec: EngineSpec, worker: Worker) -> Device:
    """The worker's device; raises DeviceError if it cannot satisfy the settings."""
    device = choose_device(spec.config.device)
    if device.note:
        logger.warning("worker %s %s", worker.address, device.note)
    if spec.config.deterministic and not device.is_host:
        raise DeviceError(
            f"distkv.deterministic holds on CPUs only: on {device.name} the batch determines how a row's "
            "attention is split. Set distkv.device to cpu, or distkv.deterministic to false"
        )
    return device
