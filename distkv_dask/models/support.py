"""Which models DistAttention computes exactly: a check of the configuration, made before any weight is read.

DistAttention is plain causal softmax attention over all earlier tokens, the same in every layer. A configuration that
asks for anything else is refused here by name. What a configuration does not tell is found by running the loaded model
(:mod:`distkv_dask.worker.model.probe`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from distkv_dask.errors import UnsupportedModelError

_FULL = "full_attention"
_PLAIN = frozenset((_FULL, "attention"))
_SLIDING = "sliding_attention"

_REFUSED_WHEN_SET: Mapping[str, str] = {
    "attn_logit_softcapping": "a soft cap on attention logits",
    "alibi": "ALiBi position biases",
    "kv_lora_rank": "latent (MLA) attention",
    "is_encoder_decoder": "an encoder beside the decoder",
    "use_bidirectional_attention": "attention that is not causal",
    "attn_temperature_tuning": "attention temperatures that count positions from the start of each call",
    "state_size": "state-space layers",
}
"""Configuration keys that, set to anything true, name a feature that DistAttention does not compute."""

_REFUSED_TYPES: Mapping[str, str] = {
    "gpt_oss": "attention sinks",
    "bloom": "ALiBi position biases",
    "mpt": "ALiBi position biases",
    "rwkv": "linear attention layers",
}
"""Model types whose feature is in the code of the model and in no key of its configuration."""

_LENGTH_DEPENDENT_ROPE = "longrope"
"""Rotary embeddings whose frequencies are others for sequences longer than the original length. (``dynamic`` ones
change only past ``max_position_embeddings``, and requests that long are refused.)"""


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
        Naming the model type, the feature and the configuration key.
    """
    text = _text_part(config)
    for key, feature in _unsupported(text):
        value = getattr(text, key, None)
        raise UnsupportedModelError(
            f"model type {text.model_type!r} uses {feature} (configuration key {key}={value!r}), which DistAttention "
            "does not compute. Choose a model whose layers all attend to all earlier tokens, for example of the Llama, "
            "Qwen2, Qwen3, Mistral (v0.2 or later), Mixtral or Qwen3-MoE families."
        )


def max_positions(config: Any) -> int:
    """Return the longest sequence, in tokens, that the model was made for."""
    return int(_text_part(config).max_position_embeddings)


def _text_part(config: Any) -> Any:
    text_config = getattr(config, "get_text_config", None)
    return text_config() if text_config is not None else config


def _unsupported(config: Any) -> Iterator[tuple[str, str]]:
    """Yield (configuration key, feature) of everything in ``config`` that is not plain causal full attention."""
    if config.model_type in _REFUSED_TYPES:
        yield "model_type", _REFUSED_TYPES[config.model_type]
    for key, feature in _REFUSED_WHEN_SET.items():
        if getattr(config, key, None):
            yield key, feature
    if getattr(config, "is_causal", True) is False:
        yield "is_causal", "attention that is not causal"
    yield from _windows(config)
    yield from _rope(config)


def _windows(config: Any) -> Iterator[tuple[str, str]]:
    """Yield what limits the keys that a layer sees; a limit no shorter than the longest sequence is none."""
    # two names of one list: some types have the first as an alias of the second, and others the other way round
    key = next((key for key in ("layer_types", "layers_block_type") if getattr(config, key, None)), "layer_types")
    kinds = set(getattr(config, key, None) or ())
    for kind in sorted(kinds - _PLAIN - {_SLIDING}):
        yield key, f"layers of the kind {kind!r}"
    if (_SLIDING in kinds or not kinds) and window_in_effect(config, getattr(config, "sliding_window", None)):
        yield "sliding_window", "a sliding window"
    if not kinds and window_in_effect(config, getattr(config, "attention_chunk_size", None)):
        yield "attention_chunk_size", "chunked attention"


def window_in_effect(config: Any, window: object) -> bool:
    """Tell whether a window of ``window`` tokens hides any token of a sequence of the model's full length."""
    # use_sliding_window is left to the configurations that know it: they drop their window, and others ignore the key
    return isinstance(window, int) and 0 < window < max_positions(config)


def _rope(config: Any) -> Iterator[tuple[str, str]]:
    """Yield rotary embeddings that change with the sequence's length: keys stored earlier would become wrong."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    for rope in nested or [parameters]:
        if rope.get("rope_type") != _LENGTH_DEPENDENT_ROPE:
            continue
        if (rope.get("original_max_position_embeddings") or 0) < max_positions(config):
            yield "rope_parameters", "rotary embeddings that depend on the sequence's length"
