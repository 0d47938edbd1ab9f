"""Startup of an engine on a worker: the model is loaded, and a pool allocated that fits beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil

from distkv_dask.errors import CapacityError, ConfigError
from distkv_dask.geometry import Geometry
from distkv_dask.kernels import make_ready
from distkv_dask.messages.from_worker import FromWorker, Opened
from distkv_dask.messages.names import KV_MEMORY_RESOURCE, EngineSpec
from distkv_dask.worker.blocks.files import BlockFiles
from distkv_dask.worker.blocks.pool import BlockShape, Pool
from distkv_dask.worker.engine import WorkerEngine
from distkv_dask.worker.heap import keep_freed_memory
from distkv_dask.worker.lanes import Lanes
from distkv_dask.worker.runtime import Runtime
from distkv_dask.worker.timing.measurement import BATCH, FORM, LONGEST, measure
from distkv_dask.worker.timing.measurement_cache import cached_measurement, hardware

if TYPE_CHECKING:
    from distributed import Worker

PAUSE_FRACTION = 0.8
"""Dask pauses a worker whose process is above this part of its memory limit (``distributed.worker.memory.pause``)."""


def build_engine(
    spec: EngineSpec,
    geometry: Geometry | None,
    lanes: Lanes,
    worker: Worker,
    tell: Callable[[str, FromWorker], None],
) -> WorkerEngine:
    """Load the model and allocate the pool of an engine on a worker; blocks for seconds.

    A memory worker is given the model's ``geometry`` instead, which is all that it needs.

    Raises
    ------
    ModelError, UnsupportedModelError
        The model cannot be loaded or served.
    CapacityError, ConfigError
        KV memory is too small for a block or does not fit the worker.
    """
    model = None
    if geometry is None:
        # takes seconds and memory, which memory workers do not spend
        from distkv_dask.worker.model.loaded import load_model

        model = load_model(spec.model, spec.dtype, lanes.threads, spec.rope_scaling, spec.config.deterministic)
        geometry = model.geometry
    block_tokens = spec.config.block_tokens
    block = BlockShape(geometry.layers, geometry.kv_heads, geometry.head_dim, geometry.dtype, block_tokens)
    pool = Pool(block, _kv_memory(spec, worker, block) // block.nbytes)
    make_ready(pool.keys(0), geometry.heads)
    keep_freed_memory()
    runtime = Runtime(spec, model, pool, lanes)
    role: Literal["instance", "memory"] = "memory" if model is None else "instance"
    channels = runtime.dialer.explain()
    key = {
        "form": FORM,
        **asdict(geometry),
        "role": role,
        "weights": 0 if model is None else model.parameters,
        "threads": lanes.threads,
        "deterministic": spec.config.deterministic,
        "block_tokens": block_tokens,
        "blocks": min(pool.capacity_blocks, LONGEST // block_tokens + 2 * BATCH),  # more change nothing
        "channel": channels,
        **hardware(),
    }
    timing = partial(measure, spec.engine, geometry, runtime, lanes, has_model=model is not None)
    timings = cached_measurement(key, spec.config.performance, timing)
    folder = Path(worker.local_directory) / f"distkv-{spec.engine}"
    report = partial(tell, spec.engine)
    files = BlockFiles(pool, worker.address, folder, spec.config, report)
    facts = Opened(
        worker.address,
        lanes.endpoint,
        role=role,
        channels=channels,
        capacity_blocks=pool.capacity_blocks,
        block_bytes=block.nbytes,
        spill_bytes=files.capacity,
        geometry=geometry,
        fingerprint="" if model is None else model.fingerprint,
        measured=timings,
    )
    return WorkerEngine(runtime, model, files, facts, report)


def _kv_memory(spec: EngineSpec, worker: Worker, block: BlockShape) -> int:
    """Bytes of KV memory on a worker: what the settings or its resources say, else half of its memory.

    Raises
    ------
    ConfigError, CapacityError
        It has no memory limit to take half of; it is less than a block, or does not fit beside what is there.
    """
    limit = worker.memory_manager.memory_limit
    kv_memory = spec.config.kv_memory
    if KV_MEMORY_RESOURCE in worker.state.total_resources:
        kv_memory = int(worker.state.total_resources[KV_MEMORY_RESOURCE])
    if kv_memory is None:
        if not limit:
            raise ConfigError(
                f"worker {worker.address} has no memory limit to take half of: give kv_memory (distkv.kv-memory)"
            )
        kv_memory = limit // 2
    if kv_memory < block.nbytes:
        raise CapacityError(
            f"kv_memory is {kv_memory} bytes, but one block of {block.block_tokens} tokens of this model needs "
            f"{block.nbytes}: raise kv_memory (distkv.kv-memory) or lower distkv.block-tokens"
        )
    resident = psutil.Process().memory_info().rss
    if limit and resident + kv_memory > PAUSE_FRACTION * limit:
        raise CapacityError(
            f"kv_memory of {kv_memory} bytes does not fit worker {worker.address}: its process holds {resident} bytes "
            f"(model included), and Dask pauses it above {PAUSE_FRACTION:.0%} of its memory limit of {limit} bytes. "
            f"Lower kv_memory (distkv.kv-memory) or raise the worker's memory_limit."
        )
    return kv_memory
