"""Loading of a model's weights on a worker, with all checks before it serves a request."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from distkv_dask.errors import ModelError, UnsupportedModelError
from distkv_dask.geometry import Geometry
from distkv_dask.models.model_class import model_class
from distkv_dask.models.source import ModelSource, resolve_model
from distkv_dask.models.support import check_supported, max_positions
from distkv_dask.placement import Stage
from distkv_dask.worker.device import HOST, Device, Use
from distkv_dask.worker.model.cut import keep_layers
from distkv_dask.worker.model.fingerprint import fingerprint
from distkv_dask.worker.model.loaded import LoadedModel
from distkv_dask.worker.model.long_rope import pin_long_rope
from distkv_dask.worker.model.mapped import few_pages
from distkv_dask.worker.model.probe import probe
from distkv_dask.worker.model.read_weights import Weights, in_rows, on_disk, read_weights
from distkv_dask.worker.model.row_tiles import check_rows_alike, compute_rows_alike
from distkv_dask.worker.model.sparse_rows import has_sparse_rows

_DTYPES = ("auto", "bfloat16", "float16", "float32")

_loading = threading.Lock()
"""Loading changes torch's default dtype and transformers' verbosity, which all threads of a process share."""


def load_model(
    name: str,
    dtype: str,
    threads: int,
    rope_scaling: Mapping[str, Any] | None = None,
    deterministic: bool = False,
    device: Device = HOST,
    from_disk: bool = False,
    stage: Stage | None = None,
) -> LoadedModel:
    """Load a model on this machine and check that DistAttention computes it exactly.

    Call it on the thread that will run the model: the number of torch threads is set for it.

    Parameters
    ----------
    name, rope_scaling
        As :func:`~distkv_dask.models.source.resolve_model` takes them.
    dtype
        ``"bfloat16"``, ``"float16"``, ``"float32"``, or ``"auto"``: that of the checkpoint (of a GGUF file: bfloat16).
    threads
        Torch threads.
    deterministic
        Whether logits must not depend on how many rows are computed at once.
    device
        Where its weights go.
    from_disk
        Whether layers are read from disk while others compute.
    stage
        Which layers are kept, if others are on other workers.

    Raises
    ------
    DeviceError
        When they do not fit there.
    ModelError
        When the model does not exist or cannot be loaded, or the dtype is unknown.
    UnsupportedModelError
        When its attention is not what DistAttention computes, or it cannot be ``deterministic``.
    """
    if dtype not in _DTYPES:
        raise ModelError(f"dtype is {dtype!r}; choose one of {', '.join(_DTYPES)}")
    source = resolve_model(name, rope_scaling)
    torch.set_num_threads(threads)
    with _loading, _quiet():
        model, whole, weights = _read(source, dtype, deterministic, device, from_disk, stage)
        geometry = whole
        if stage is not None:
            with few_pages(model):
                geometry = keep_layers(model, whole, stage)
    loaded = LoadedModel(model, geometry, _eos_token_ids(model), source.tokenizer, weights)
    loaded.stage, loaded.whole = stage, whole
    if deterministic:
        _make_deterministic(model, loaded)
    if not device.is_host:
        with device.stream(Use.HOME):
            loaded.try_capture()
            device.finish()
    device.finish()  # lanes have their own streams
    return loaded


def _read(
    source: ModelSource, dtype: str, deterministic: bool, device: Device, from_disk: bool, stage: Stage | None
) -> tuple[Any, Geometry, Weights]:
    """The model with all its weights, checked; for parameters and errors see :func:`load_model`.

    A stage's worker has no memory for all of them, so it maps them and releases the pages that it has read.
    """
    check_supported(config := source.config())
    load = model_class(config, source.name).from_pretrained
    source.check_weights(config)
    rows = has_sparse_rows(config) and device.is_host and not from_disk and not deterministic and stage is None
    files = source.stamp()
    model, where = read_weights(load, source, config, dtype, device, rows)
    pin_long_rope(model, max_positions(config))
    with few_pages(model) if stage is not None else nullcontext() as drop_pages:
        weights = Weights(device, where, fingerprint(model, drop_pages), files)
        if from_disk:
            weights = on_disk(model, weights)
        geometry = probe(model, latents=not deterministic)
    if weights.disk is not None:
        weights.disk.check_taken()
    return model, geometry, in_rows(model, weights) if rows else weights


def _make_deterministic(model: Any, loaded: LoadedModel) -> None:
    if loaded.geometry.state_bytes:
        raise UnsupportedModelError(
            f"model type {model.config.model_type!r} has recurrent layers, whose results depend on how a prompt is cut "
            "into chunks: set distkv.deterministic to false, or choose a model whose layers all are attention"
        )
    compute_rows_alike(model)
    loaded.adapters.alike = True
    check_rows_alike(loaded.forward, loaded.geometry, loaded.device.torch)


def _eos_token_ids(model: Any) -> frozenset[int]:
    """Return the ids that end a sequence; the generation configuration may know more of them than the model's."""
    for config in (model.generation_config, model.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            several = ids if isinstance(ids, list | tuple) else [ids]
            if not all(isinstance(one, int) for one in several):
                raise ModelError(
                    f"the model's eos_token_id is {ids!r:.100}, but must be one token id or a list of them"
                )
            return frozenset(several)
    return frozenset()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and hints out of the workers' logs."""
    logging: Any = transformers_logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
