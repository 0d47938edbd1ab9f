"""What is known of a model before a cluster starts: whether it is served and why not, and the memory that it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distkv_dask.errors import ModelError
from distkv_dask.models.layer_values import layer_values
from distkv_dask.models.model_class import model_class
from distkv_dask.models.source import ModelSource, resolve_model
from distkv_dask.models.support import check_supported, max_positions

_NUMBERS = 8
"""Heads are stored with a multiple of that many numbers."""


@dataclass(frozen=True, slots=True)
class ModelReport:
    """What is known of a model.

    Parameters
    ----------
    model
        Its name, or where it is.
    type
        transformers' name of its type; empty where its configuration cannot be read.
    reason
        Why it is not served; None where it is, as far as its files tell: a dry run with the weights comes when an
        engine opens.
    weight_bytes
        Memory of its weights; None where its files are not on this machine.
    kv_bytes_per_token
        Memory of a token's keys and values in all layers; None where it is not served.
    window
        Longest sequence in tokens.
    """

    model: str
    type: str = ""
    reason: str | None = None
    weight_bytes: int | None = None
    kv_bytes_per_token: int | None = None
    window: int | None = None


def report_on(name: str, dtype: str = "auto", rope_scaling: Mapping[str, Any] | None = None) -> ModelReport:
    """Find a model and see what its files say; weights are not read.

    Parameters
    ----------
    name, dtype, rope_scaling
        As ``Engine`` takes them.
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
    except ModelError as error:
        return ModelReport(source.name, text.model_type, str(error))
    return ModelReport(source.name, text.model_type, None, weights, per_token, max_positions(config))


def kv_bytes_per_token(config: Any, dtype: str) -> int:
    """Bytes of a token's keys and values in all layers, in the form of the pool: the largest of all layers in each.

    Parameters
    ----------
    config
        The text part of a transformers configuration.
    dtype
        torch's name of the KV cache's dtype.
    """
    heads = max(layer_values(config, "num_attention_heads"))
    kv_heads = max(one or heads for one in layer_values(config, "num_key_value_heads"))
    planes, rank = 2, getattr(config, "kv_lora_rank", None)
    if rank:  # a latent and the rotated part of the keys, once for all heads
        planes, kv_heads, sizes = 1, 1, [rank + config.qk_rope_head_dim]
    else:
        keys = "head_dim", "global_head_dim"
        sizes = [one for key in keys for one in layer_values(config, key) if one] or [config.hidden_size // heads]
    numbers = -(-max(sizes) // _NUMBERS) * _NUMBERS
    return int(_attending(config) * planes * kv_heads * numbers * (4 if dtype == "float32" else 2))


def _attending(config: Any) -> int:
    """Layers with attention: others have a state, or nothing."""
    kinds = getattr(config, "layer_types", None) or ("full_attention",) * config.num_hidden_layers
    return sum(kind not in ("linear_attention", "conv", "mamba", "mlp", "moe") for kind in kinds)


def _kv_dtype(source: ModelSource, config: Any, dtype: str) -> str:
    if dtype != "auto":
        return dtype
    return "bfloat16" if source.kind == "gguf" else str(config.dtype or "float32").removeprefix("torch.")
