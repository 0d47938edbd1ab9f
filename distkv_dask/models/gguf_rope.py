"""Rotary position embeddings of a GGUF file: base, width, scaling, and a factor for each frequency.

Transformers reads the base for some architectures, and nothing else. Factors (``rope_freqs.weight``, of Llama 3.1 and
later) divide frequencies, as those of ``longrope`` do (``transformers.modeling_rope_utils``), so they are set as its
short and long factors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from distkv_dask.errors import ModelError

FACTORS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
"""Tensors that are not weights, but factors of frequencies."""

_SCALING = "rope.scaling."
KEYS = frozenset(
    (
        *("rope.dimension_count", "rope.freq_base", "rope.scale_linear"),
        *(f"{_SCALING}{key}" for key in ("type", "factor", "attn_factor", "original_context_length", "finetuned")),
        *(f"{_SCALING}yarn_{key}" for key in ("ext_factor", "attn_factor", "beta_fast", "beta_slow")),
    )
)
"""Keys that :func:`set_rope` applies."""

_DEFAULT_BASE = 10000.0
"""llama.cpp's default."""


def set_rope(config: Any, keys: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Set the rotary embeddings of a transformers configuration as a GGUF file says.

    Parameters
    ----------
    config
        Changed in place; its sizes are already right.
    keys, tensors
        Those of the file (:class:`~distkv_dask.models.gguf_parts.GgufModel`).

    Raises
    ------
    ModelError
        When transformers cannot compute them.
    """
    if (every := getattr(config, "rope_parameters", None)) is None:
        if found := sorted(KEYS.intersection(keys)):
            raise ModelError(f"it says {found[0]}, but model type {config.model_type!r} has no rotary embeddings")
        return
    nested = {kind: one for kind, one in every.items() if isinstance(one, Mapping)}
    # layers with windows, among others without, have their own base and no scaling
    changed = {**(nested.get("full_attention") or every)}
    if "rope.freq_base" in keys or not nested:
        changed["rope_theta"] = float(keys.get("rope.freq_base", _DEFAULT_BASE))
    _set_width(config, changed, keys)
    changed |= _scaling(keys) | _factors(config, keys, tensors)
    if (length := "original_max_position_embeddings") in changed and hasattr(config, length):
        setattr(config, length, changed[length])  # Phi-3 has it twice
    config.rope_parameters = {**every, "full_attention": changed} if nested else changed


def _set_width(config: Any, rope: dict[str, Any], keys: Mapping[str, Any]) -> None:
    """Number of rotated elements of a head."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = int(keys.get("rope.dimension_count", size))
    if hasattr(config, "rotary_dim"):
        config.rotary_dim = width
    elif "partial_rotary_factor" in rope:
        rope["partial_rotary_factor"] = width / size
    elif width != size:
        raise ModelError(f"it rotates {width} of {size} numbers of a head (rope.dimension_count), but transformers all")


def _scaling(keys: Mapping[str, Any]) -> dict[str, Any]:
    said = {key.removeprefix(_SCALING): value for key, value in keys.items() if key.startswith(_SCALING)}
    kind = said.get("type", "none")
    factor = float(said.get("factor") or keys.get("rope.scale_linear") or 0)
    if kind in ("none", "longrope"):
        return {"rope_type": "linear", "factor": factor} if "rope.scale_linear" in keys and factor != 1 else {}
    if kind not in ("linear", "yarn") or not factor:
        raise ModelError(f"it scales rotary embeddings in a way that is not known here (rope.scaling: {said})")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if said.get("yarn_ext_factor", 1) != 1 or said.get("yarn_attn_factor", 1) != 1 or said.get("attn_factor", 1) != 1:
        raise ModelError(f"it scales rotary embeddings by a YaRN that transformers does not compute: {said}")
    if "original_context_length" not in said:
        raise ModelError("it scales rotary embeddings by YaRN, but says no rope.scaling.original_context_length")
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": int(said["original_context_length"]),
        "beta_fast": float(said.get("yarn_beta_fast", 32)),
        "beta_slow": float(said.get("yarn_beta_slow", 1)),
    }


def _factors(config: Any, keys: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Factors of frequencies as those of longrope: one set for every length, or one for short and one for long ones."""
    names = [name for name in (FACTORS, SHORT, LONG) if name in tensors]
    if not names:
        return {}
    if keys.get(f"{_SCALING}type", "none") not in ("none", "longrope"):
        raise ModelError(f"it scales rotary embeddings twice, by {names[0]} and by rope.scaling.type")
    short, long = (list(_numbers(tensors[name])) for name in (names[0], names[-1]))
    original = keys.get(f"{_SCALING}original_context_length") if LONG in names else None
    return {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": int(original or config.max_position_embeddings),
        "attention_factor": float(keys.get(f"{_SCALING}attn_factor", 1.0)),
    }


def _numbers(tensor: Any) -> Iterator[float]:
    from gguf import dequantize

    yield from dequantize(tensor.data, tensor.tensor_type).reshape(-1).tolist()
