"""Models that engines of one process share: a second engine on a model opens without reading its weights again."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch

from distkv_dask.models.source import resolve_model
from distkv_dask.placement import Stage
from distkv_dask.worker.device import Device
from distkv_dask.worker.model.load import load_model
from distkv_dask.worker.model.loaded import LoadedModel

_lock = threading.Lock()
_models: WeakValueDictionary[tuple[Any, ...], LoadedModel] = WeakValueDictionary()
"""Models in use, by everything that they depend on; a model is freed when its last engine closes."""


def shared_model(
    name: str,
    dtype: str,
    threads: int,
    rope_scaling: Mapping[str, Any] | None,
    deterministic: bool,
    device: Device,
    weights: str,
    place: Callable[[], bool],
    stage: Stage | None = None,
) -> LoadedModel:
    """A model that an open engine of this process has, or a newly loaded one.

    For parameters and errors see :func:`~distkv_dask.worker.model.load.load_model`; ``place`` is called before weights
    are read, and says whether to read layers from disk; ``weights`` is the setting that it follows. A model whose files
    have changed is another model. On cards nothing is shared, because the streams of an engine belong to its own model;
    nor are layers from disk, because a model has its own buffers.
    """
    load = partial(load_model, name, dtype, threads, rope_scaling, deterministic, device, stage=stage)
    if not device.is_host:
        return load(from_disk=place())
    files = resolve_model(name).stamp(), dtype, json.dumps(rope_scaling, sort_keys=True), deterministic, weights
    key: tuple[Any, ...] = *files, *((stage.number, stage.count) if stage is not None else ())
    with _lock:
        model = _models.get(key)
        if model is None:
            from_disk = place()
            model = load(from_disk=from_disk)
            if not from_disk:
                _models[key] = model
    torch.set_num_threads(threads)  # of this thread, which will run the model
    return model
