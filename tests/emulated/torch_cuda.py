"""Functions of ``torch.cuda`` while the card is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from emulated.faults import FAULTS
from emulated.graphs import CUDAGraph, MemPool, graph, graph_pool_handle
from emulated.memory import Card
from emulated.streams import (
    DEFAULT,
    Event,
    Stream,
    StreamContext,
    current_stream,
    set_stream,
    synchronize,
)

Device = Any


def functions(card: Card) -> dict[str, Any]:
    """Functions and classes of ``torch.cuda``, by name."""
    return {**_device(card), **_memory(card), **_streams()}


def _index(device: Device) -> int:
    """The number of a device; there is only card 0."""
    index = device if isinstance(device, int) else torch.device("cuda" if device is None else device).index or 0
    if index > 0:
        raise RuntimeError("CUDA error: invalid device ordinal")
    return 0


def _device(card: Card) -> dict[str, Callable[..., Any]]:
    def properties(device: Device = None) -> Any:
        _index(device)
        return card.properties

    return {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": _index,
        "get_device_properties": properties,
        "get_device_name": lambda device=None: properties(device).name,
        "get_device_capability": lambda device=None: (properties(device).major, properties(device).minor),
        "is_bf16_supported": lambda including_emulation=True: True,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "device": _DeviceContext,
    }


class _DeviceContext:
    """``torch.cuda.device(...)``, which has no other device to switch to."""

    def __init__(self, device: Device) -> None:
        _index(device)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def _memory(card: Card) -> dict[str, Callable[..., Any]]:
    def reset_peak(device: Device = None) -> None:
        card.peak, card.peak_reserved = card.allocated, card.reserved

    def mem_get_info(device: Device = None) -> tuple[int, int]:
        FAULTS.call()
        return card.ours - card.reserved, card.total

    return {
        "mem_get_info": mem_get_info,
        "memory_allocated": lambda device=None: card.allocated,
        "max_memory_allocated": lambda device=None: card.peak,
        "memory_reserved": lambda device=None: card.reserved,
        "max_memory_reserved": lambda device=None: card.peak_reserved,
        "reset_peak_memory_stats": reset_peak,
        "empty_cache": card.empty_cache,
    }


def _streams() -> dict[str, Any]:
    return {
        "Stream": Stream,
        "Event": Event,
        "StreamContext": StreamContext,
        "stream": StreamContext,
        "current_stream": current_stream,
        "default_stream": lambda device=None: DEFAULT,
        "set_stream": set_stream,
        "synchronize": synchronize,
        "CUDAGraph": CUDAGraph,
        "MemPool": MemPool,
        "graph": graph,
        "graph_pool_handle": graph_pool_handle,
        "is_current_stream_capturing": lambda: current_stream().capture is not None,
    }
