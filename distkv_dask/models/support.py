"""Which models DistAttention computes exactly: a check of the configuration, made before any weight is read.

DistAttention is causal softmax attention over earlier tokens: in each layer over all of them, over a sliding window, or
over chunks, with soft caps and sinks. Recurrent layers of models with attention compute with states, at a sequence's
home. A configuration with any other feature is refused here by name. Features that a configuration does not show are
found by running the loaded model (:mod:`distkv_dask.worker.model.layer_kinds`, :mod:`distkv_dask.worker.model.probe`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from distkv_dask.errors import UnsupportedModelError

_SERVED = frozenset(
    (
        *("full_attention", "sliding_attention", "chunked_attention", "attention"),
        *("linear_attention", "conv", "mamba", "hybrid", "hybrid_sliding", "mlp", "moe"),
    )
)
"""Kinds of layers, as transformers' ``layer_types`` name them: attention, recurrent ones, both, and neither."""

_REFUSED_WHEN_SET: Mapping[str, str] = {
    "alibi": "ALiBi position biases",
    "index_topk": "sparse attention to selected keys (DSA)",
    "is_encoder_decoder": "an encoder in addition to the decoder",
    "state_size": "state-space layers",
}
"""Configuration keys that, with any true value, enable a feature that DistAttention does not compute."""

_NEEDED: Mapping[str, str] = {
    "max_position_embeddings": "unlimited sequence lengths",
    "num_hidden_layers": "an unknown number of layers",
}
"""Configuration keys of every model that DistAttention computes, and the feature of a model without one."""

_REFUSED_TYPES: Mapping[str, str] = {
    "bloom": "ALiBi position biases",
    "minimax": "recurrent layers with a separate cache",
    "mpt": "ALiBi position biases",
    "rwkv": "linear attention layers",
}
"""Model types with a feature that is in the code of the model, but in no key of its configuration."""


def check_supported(config: Any) -> None:
    """Refuse a model whose attention DistAttention would not compute exactly.

    Parameters
    ----------
    config
        A transformers configuration (or anything with its attributes). That of a model with several parts is reduced
        to its text part.

    Raises
    ------
    UnsupportedModelError
        The message names the model type, the feature and the configuration key.
    """
    text = _text_part(config)
    for key, feature in _unsupported(text):
        value = getattr(text, key, None)
        raise UnsupportedModelError(
            f"model type {text.model_type!r} uses {feature} (configuration key {key}={value!r}), which DistAttention "
            "does not compute. Choose a model with softmax attention in all layers, for example of the Llama, Qwen3, "
            "Mistral, Gemma 3, Phi-4 or gpt-oss families."
        )


def max_positions(config: Any) -> int:
    """Return the longest sequence, in tokens, for which the model was made."""
    return int(_text_part(config).max_position_embeddings)


def _text_part(config: Any) -> Any:
    text_config = getattr(config, "get_text_config", None)
    return text_config() if text_config is not None else config


def _unsupported(config: Any) -> Iterator[tuple[str, str]]:
    """Yield (configuration key, feature) of all features in ``config`` that DistAttention does not compute."""
    if config.model_type in _REFUSED_TYPES:
        yield "model_type", _REFUSED_TYPES[config.model_type]
    for key, feature in _REFUSED_WHEN_SET.items():
        if getattr(config, key, None):
            yield key, feature
    if getattr(config, "is_causal", True) is False:
        yield "is_causal", "attention that is not causal"
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):  # "vision": among tokens of an image
        yield "use_bidirectional_attention", "attention that is not causal"
    yield from _layers(config)
    for key, feature in _NEEDED.items():
        if getattr(config, key, None) is None:
            yield key, feature


def _layers(config: Any) -> Iterator[tuple[str, str]]:
    """Yield layers of other kinds."""
    # two names of one list: in some types the first is an alias of the second, in others the other way round
    key = next((key for key in ("layer_types", "layers_block_type") if getattr(config, key, None)), "layer_types")
    for kind in sorted(set(getattr(config, key, None) or ()) - _SERVED):
        yield key, f"layers of type {kind!r}"
