"""Reads a model's weights through transformers, from its files or from tensors in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distkv_dask.errors import DeviceError, ModelError, UnsupportedModelError, in_words
from distkv_dask.models.complete import check_complete
from distkv_dask.models.gguf_cache import converted_weights
from distkv_dask.models.source import ModelSource
from distkv_dask.worker.device import Device
from distkv_dask.worker.model.from_disk import DiskLayers
from distkv_dask.worker.model.hook import IMPLEMENTATION
from distkv_dask.worker.model.host_copy import ALONE, Read, loaded_once
from distkv_dask.worker.model.sparse_rows import RowCounts, lay_in_rows, skip_zero_rows
from distkv_dask.worker.model.text_part import drop_other_parts


@dataclass(frozen=True, slots=True)
class Weights:
    """The location of a model's weights.

    Parameters
    ----------
    device
        The device that has them.
    where
        Whether other processes share that memory, or whether layers are on disk, in words.
    fingerprint
        Their fingerprint.
    files
        The files that they were read from, with what shows a change of one.
    disk
        Reads layers from disk.
    rows
        Weights whose rows of zeros are skipped.
    """

    device: Device
    where: str
    fingerprint: str
    files: tuple[tuple[str, int, int], ...] = ()
    disk: DiskLayers | None = None
    rows: RowCounts | None = None


def read_weights(
    load: Any, source: ModelSource, config: Any, dtype: str, device: Device, rows: bool
) -> tuple[Any, str]:
    """Read a model with its weights.

    Parameters
    ----------
    load
        ``from_pretrained`` of its class.
    source, config
        Where it is, and its configuration.
    dtype, device
        As :func:`~distkv_dask.worker.model.load.load_model` takes them.
    rows
        Whether the weights of down projections are stored row by row.

    Returns
    -------
    model, where
        The model, and where its weights are, in words.

    Raises
    ------
    DeviceError, ModelError
        They do not fit the device, or cannot be read.
    """
    if source.kind == "gguf" and dtype == "auto":
        dtype = "bfloat16"
    read = partial(_read, load, source, config, dtype, device)
    if device.is_host:
        once = partial(_laid, read) if rows else read
        model, where = loaded_once(once, source.name, (source.stamp(), dtype, rows))
    else:
        model, where = read(None), f"on {device.name}"
    drop_other_parts(model)
    return model.eval().requires_grad_(False), where


def _laid(read: Read, tensors: Mapping[str, Tensor] | None) -> Any:
    model = read(tensors)
    if tensors is None:
        lay_in_rows(model)
    return model


def in_rows(model: Any, weights: Weights) -> Weights:
    """Let a model skip rows of zeros if that pays; returns the location of its weights."""
    counts = skip_zero_rows(model)
    said = f"; rows of zeros are skipped in steps of up to {counts.most_tokens} tokens" if counts.most_tokens else ""
    return replace(weights, where=weights.where + said, rows=counts)


def on_disk(model: Any, weights: Weights) -> Weights:
    """Let a model with mapped weights read its layers from their files; returns the location of its weights.

    Raises
    ------
    UnsupportedModelError
        Its layers are not in one list, their weights are not used as they are stored, or no file has them.
    """
    if weights.where.startswith(ALONE):
        raise UnsupportedModelError(
            f"layers cannot be read from disk (distkv.weights): {weights.where.removeprefix(ALONE)}; or set "
            "distkv.weights to memory"
        )
    disk = DiskLayers(model)
    return replace(weights, where=f"layers from disk, {disk.buffer_bytes} bytes in memory at a time", disk=disk)


def _read(
    load: Any, source: ModelSource, config: Any, dtype: str, device: Device, tensors: Mapping[str, Tensor] | None
) -> Any:
    """Read the weights from the model's files, or take the given ones."""
    location: str | None = None
    if tensors is None:
        is_gguf = source.kind == "gguf"
        location = str(converted_weights(Path(source.location), dtype)) if is_gguf else source.location
    try:
        model, found = load(
            location,
            state_dict=tensors,
            config=config,
            dtype=dtype,
            attn_implementation=IMPLEMENTATION,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **({} if device.is_host else {"device_map": {"": device.torch}}),
        )
    except torch.OutOfMemoryError as error:
        free, total = device.memory()
        raise DeviceError(
            f"the weights of model {source.name!r} do not fit {device.name}, which has {total} bytes of memory, "
            f"{free} of them free: choose a smaller model or dtype, or a larger card. {in_words(error)}"
        ) from error
    except Exception as error:  # safetensors' error has no common base class, and models may raise any error
        raise ModelError(f"model {source.name!r} cannot be loaded: {in_words(error)}") from error
    check_complete(found, config.get_text_config(), source.name)
    return model
