"""A report on a model before a cluster starts: whether it is served or why not, and the memory that it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from distkv_dask.errors import ModelError
from distkv_dask.geometry import LayerKind, near_layers
from distkv_dask.models.layer_values import layer_values
from distkv_dask.models.model_class import model_class
from distkv_dask.models.source import ModelSource, resolve_model
from distkv_dask.models.support import check_supported, max_positions

_NUMBERS = 8
"""Stored head sizes are multiples of this."""


@dataclass(frozen=True, slots=True)
class ModelReport:
    """A report on a model.

    Parameters
    ----------
    model
        Its name or location.
    type
        transformers' name of its type; empty if its configuration cannot be read.
    reason
        Why it is not served; None if its files show no reason: a dry run with the weights follows when an engine opens.
    weight_bytes
        Memory of its weights; None if its files are not on this machine.
    kv_bytes_per_token
        Memory of a token's keys and values, on any worker; None if it is not served.
    window_bytes
        Memory of a sequence's keys and values in the layers that see a short window only, at its home, at most twice
        that while it is computed; None if it is not served.
    window
        Longest sequence in tokens.
    """

    model: str
    type: str = ""
    reason: str | None = None
    weight_bytes: int | None = None
    kv_bytes_per_token: int | None = None
    window_bytes: int | None = None
    window: int | None = None


def report_on(name: str, dtype: str = "auto", rope_scaling: Mapping[str, Any] | None = None) -> ModelReport:
    """Find a model and read its files, except for weights.

    Parameters
    ----------
    name, dtype, rope_scaling
        As for ``Engine``.
    """
    try:
        source = resolve_model(name, rope_scaling)
        config = source.config()
        text = config.get_text_config()
    except ModelError as error:
        return ModelReport(name, reason=str(error))
    try:
        check_supported(config)
        model_class(config, source.name)
        source.check_weights(config)
        weights = source.weight_bytes(config, dtype)
        per_token = kv_bytes_per_token(text, _kv_dtype(source, config, dtype))
        windows = window_bytes(text, _kv_dtype(source, config, dtype))
    except ModelError as error:
        return ModelReport(source.name, text.model_type, str(error))
    return ModelReport(source.name, text.model_type, None, weights, per_token, windows, max_positions(config))


def kv_bytes_per_token(config: Any, dtype: str) -> int:
    """Bytes of a token's keys and values in the pool: in all layers but those whose KV stays at homes.

    Each layer takes as much as the largest.

    Parameters
    ----------
    config
        The text part of a transformers configuration.
    dtype
        torch's name of the KV cache's dtype.
    """
    kinds = _kinds(config)
    return (len(kinds) - len(near_layers(kinds, max_positions(config)))) * _layer_bytes(config, dtype)


def window_bytes(config: Any, dtype: str) -> int:
    """Bytes of a sequence's keys and values in the layers whose KV stays at its home.

    Parameters
    ----------
    config, dtype
        As for :func:`kv_bytes_per_token`.
    """
    kinds = _kinds(config)
    near = near_layers(kinds, max_positions(config))
    return len(near) * max((kinds[at].size for at in near), default=0) * _layer_bytes(config, dtype)


def _layer_bytes(config: Any, dtype: str) -> int:
    """Bytes of a token's keys and values in one layer."""
    heads = max(layer_values(config, "num_attention_heads"))
    kv_heads = max(one or heads for one in layer_values(config, "num_key_value_heads"))
    planes, rank = 2, getattr(config, "kv_lora_rank", None)
    if rank:  # a latent and the rotated part of the keys, once for all heads
        planes, kv_heads, sizes = 1, 1, [rank + config.qk_rope_head_dim]
    else:
        keys = "head_dim", "global_head_dim"
        sizes = [one for key in keys for one in layer_values(config, key) if one] or [config.hidden_size // heads]
    numbers = -(-max(sizes) // _NUMBERS) * _NUMBERS
    return int(planes * kv_heads * numbers * (4 if dtype == "float32" else 2))


def _kinds(config: Any) -> tuple[LayerKind, ...]:
    """What the layers with attention see, by the configuration; other layers have a state, or nothing."""
    names = getattr(config, "layer_types", None) or ("full_attention",) * config.num_hidden_layers
    sliding, chunk = (getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size"))
    kinds: dict[str, tuple[Literal["sliding", "chunked"], int | None]] = {
        "sliding_attention": ("sliding", sliding),
        "hybrid_sliding": ("sliding", sliding),
        "chunked_attention": ("chunked", chunk),
    }
    found = []
    for name in names:
        if name not in ("linear_attention", "conv", "mamba", "mlp", "moe"):
            visible, size = kinds.get(name, ("sliding", None))
            found.append(LayerKind(visible, size) if size and size < max_positions(config) else LayerKind())
    return tuple(found)


def _kv_dtype(source: ModelSource, config: Any, dtype: str) -> str:
    if dtype != "auto":
        return dtype
    return "bfloat16" if source.kind == "gguf" else str(config.dtype or "float32").removeprefix("torch.")
