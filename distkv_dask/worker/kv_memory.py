"""Sizes of a worker's KV memory for an engine, and of host memory for evicted blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import psutil
import torch

from distkv_dask.config import Config
from distkv_dask.errors import CapacityError, ConfigError, DeviceError
from distkv_dask.geometry import Geometry
from distkv_dask.messages.names import KV_MEMORY_RESOURCE, PAUSE_FRACTION, EngineSpec
from distkv_dask.models.weight_sizes import kv_beside
from distkv_dask.worker.blocks.pool import BlockShape
from distkv_dask.worker.device import Device
from distkv_dask.worker.home.states import KEPT
from distkv_dask.worker.home.windows import blocks_per_chunk, blocks_per_sequence
from distkv_dask.worker.model.no_attention import NoAttention
from distkv_dask.worker.weight_memory import free_memory, until_paused

if TYPE_CHECKING:
    from distributed import Worker

    from distkv_dask.worker.model.loaded import LoadedModel

STATE_SHARE = 0.25
"""Maximum part of the KV memory for states of recurrent layers."""
WINDOW_SHARE = 0.5
"""The same with windows of layers, which would otherwise take most of it."""

MARGIN = 0.05
"""Part of a card's memory left free by default: for kernels, other libraries and fragmentation."""


def kv_memory(spec: EngineSpec, worker: Worker, block: BlockShape, device: Device, model: LoadedModel | None) -> int:
    """Bytes of KV memory on a worker: from the settings or its resources, else a part of the available memory.

    On the host this is half of what the weights leave of the worker's memory limit. On a card it is the rest after the
    weights and the largest prompt chunk, which is computed once to measure it.

    Raises
    ------
    ConfigError, CapacityError, DeviceError
        There is no memory limit to take half of; or the result is less than a block, or does not fit.
    """
    asked = spec.config.kv_memory
    if KV_MEMORY_RESOURCE in worker.state.total_resources:
        asked = int(worker.state.total_resources[KV_MEMORY_RESOURCE])
    found = _on_host(worker, asked, model) if device.is_host else _on_card(spec, device, model, asked, block)
    if found < block.nbytes:
        raise CapacityError(
            f"kv_memory is {found} bytes, but one block of {block.block_tokens} tokens of this model needs "
            f"{block.nbytes}: raise kv_memory (distkv.kv-memory) or lower distkv.block-tokens"
        )
    return found


def host_memory(spec: EngineSpec, worker: Worker, device: Device) -> int:
    """Bytes of host memory for blocks evicted from a card; none on the host, where the pool itself is.

    By default a quarter of the worker's memory limit, or less if that is not free.

    Raises
    ------
    CapacityError
        The configured size does not fit.
    """
    if device.is_host:
        return 0
    asked, limit = spec.config.host_memory, worker.memory_manager.memory_limit
    if not limit:
        return asked or 0
    room = int(until_paused(worker))
    if asked is None:
        return max(0, min(limit // 4, room))
    if asked > room:
        raise CapacityError(
            f"host memory of {asked} bytes for KV from the card does not fit worker {worker.address}: {max(0, room)} "
            f"bytes are free up to where Dask pauses it ({PAUSE_FRACTION:.0%} of {limit}). Lower distkv.host-memory or "
            "raise the worker's memory_limit"
        )
    return asked


def adapter_room(worker: Worker, device: Device, kv_bytes: int) -> int:
    """Bytes that weights and KV leave for adapters; on the host, KV takes its memory only when it is written."""
    if device.is_host:
        return max(0, int(min(free_memory(), until_paused(worker))) - kv_bytes)
    return device.memory()[0]


class Needs(NamedTuple):
    """Bytes of KV memory that a home needs in addition to blocks: per sequence, and once for all of them."""

    each: int = 0
    once: int = 0
    share: float = STATE_SHARE


def needs_of(geometry: Geometry, config: Config) -> Needs:
    """Memory of recurrent layers' states, and of layers that keep a window of their KV at the home."""
    states = KEPT * geometry.state_bytes
    if not geometry.home_layers:
        return Needs(states)
    size, chunk = config.block_tokens, config.prefill_chunk_tokens
    block = BlockShape.of(geometry, size, geometry.home_layers).nbytes
    window = blocks_per_sequence(geometry, size, chunk) * block
    return Needs(states + window, blocks_per_chunk(size, chunk) * block, WINDOW_SHARE)


def rooms(memory: int, block: BlockShape, needs: Needs, batch: int) -> tuple[int, int]:
    """Blocks of a pool, and sequences of which the worker can be home, that fit into this much KV memory.

    Without needs per sequence these are ``batch``; else as many as fit into their part of the memory, at least one.

    Raises
    ------
    CapacityError
        There is no room for one sequence and one block.
    """
    each, once, share = needs
    places = min(batch, max(1, (int(share * memory) - once) // each)) if each else batch
    blocks = (memory - places * each - once) // block.nbytes
    if blocks < 1:
        raise CapacityError(
            f"kv_memory is {memory} bytes, but states and windows of one sequence need {each + once} bytes and one "
            f"block of {block.block_tokens} tokens {block.nbytes}: raise kv_memory (distkv.kv-memory) or lower "
            "distkv.block-tokens"
        )
    return blocks, places


def _on_host(worker: Worker, asked: int | None, model: LoadedModel | None) -> int:
    limit = worker.memory_manager.memory_limit
    if asked is None:
        if not limit:
            raise ConfigError(
                f"worker {worker.address} has no memory limit to take half of: give kv_memory (distkv.kv-memory)"
            )
        asked = kv_beside(0 if model is None else model.weight_bytes, limit)
    if asked > until_paused(worker):
        resident = psutil.Process().memory_info().rss
        raise CapacityError(
            f"kv_memory of {asked} bytes does not fit worker {worker.address}: its process holds {resident} bytes "
            f"(model included), and Dask pauses it above {PAUSE_FRACTION:.0%} of its memory limit of {limit} bytes. "
            f"Lower kv_memory (distkv.kv-memory) or raise the worker's memory_limit."
        )
    return asked


def _on_card(spec: EngineSpec, device: Device, model: LoadedModel | None, asked: int | None, block: BlockShape) -> int:
    chunk = 0 if model is None else _chunk_bytes(model, device, spec.config.prefill_chunk_tokens)
    free, total = device.memory()
    if asked is None:
        found = free - chunk - int(MARGIN * total)
        if found < block.nbytes:
            raise DeviceError(
                f"{device.name} has {free} of {total} bytes left, of which a prompt chunk needs {chunk} and "
                f"{int(MARGIN * total)} stay free: no KV block of {block.nbytes} bytes fits. Is another engine or "
                "worker on this card? Start one worker per card (dask-cuda does), or give each its part by kv_memory "
                "(distkv.kv-memory)"
            )
        return found
    if asked + chunk > free:
        raise DeviceError(
            f"kv_memory of {asked} bytes does not fit {device.name}: {free} of its {total} bytes are free"
            + (
                f", and a prompt chunk of {spec.config.prefill_chunk_tokens} tokens needs {chunk} of them"
                if chunk
                else ""
            )
            + ". Lower kv_memory (distkv.kv-memory) or distkv.prefill.chunk-tokens, or stop what else uses the card"
        )
    return asked


def _chunk_bytes(model: LoadedModel, device: Device, tokens: int) -> int:
    """Bytes that the largest prompt chunk needs on a card in addition to weights and KV, measured by computing one."""
    tokens = min(tokens, model.geometry.max_positions or tokens)
    try:
        with device.peak() as peak:
            ids = torch.zeros(tokens, dtype=torch.int64, device=device.torch)
            keep = torch.full((1,), tokens - 1, device=device.torch)
            model.forward(ids, torch.arange(tokens, device=device.torch), NoAttention(model.geometry.value_dim), keep)
    except torch.OutOfMemoryError as error:
        free, total = device.memory()
        raise DeviceError(
            f"a prompt chunk of {tokens} tokens does not fit {device.name}, which has {free} of {total} bytes left "
            "after the weights: lower distkv.prefill.chunk-tokens, or choose a smaller model or a larger card"
        ) from error
    return peak.bytes
