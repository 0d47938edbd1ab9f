"""Longer sequences than a model was made for: rotary position embeddings scaled by a factor.

Transformers computes the frequencies (``transformers.modeling_rope_utils``); this module knows which scalings keep
stored keys valid. ``dynamic`` and ``longrope`` do not: their frequencies change as a sequence grows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distkv_dask.errors import ConfigError

KINDS = ("yarn", "linear")
"""YaRN (arXiv 2309.00071), and position interpolation (arXiv 2306.15595)."""


def checked(scaling: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Check what a user gave as ``rope_scaling``.

    Raises
    ------
    ConfigError
        When it is of another kind, or its factor is not a number above 1.
    """
    if scaling is None:
        return None
    kind = scaling.get("rope_type") if isinstance(scaling, Mapping) else None
    if kind == "dynamic":
        raise ConfigError(
            "dynamic RoPE scaling changes its frequencies as a sequence grows, so keys that are stored become wrong: "
            "use 'yarn' or 'linear'"
        )
    if kind not in KINDS:
        raise ConfigError(f"rope_scaling is {scaling!r}, but should be like {{'rope_type': 'yarn', 'factor': 4.0}}")
    factor = scaling.get("factor")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 1 < factor < 1e4:
        raise ConfigError(f"the factor of rope_scaling is {factor!r}, but must be a number above 1")
    return dict(scaling)


def scale(config: Any, scaling: Mapping[str, Any], name: str) -> None:
    """Scale a transformers configuration in place: rotary embeddings, and the longest sequence.

    Raises
    ------
    ConfigError
        When the model has no rotary embeddings, or scales them already.
    """
    text = config.get_text_config()
    present = getattr(text, "rope_parameters", None)
    if not present or any(isinstance(one, Mapping) for one in present.values()):
        raise ConfigError(f"model {name!r} has no single set of rotary position embeddings: leave rope_scaling out")
    if present.get("rope_type", "default") != "default":
        raise ConfigError(
            f"model {name!r} scales its rotary embeddings already (rope_type={present['rope_type']!r}): leave "
            f"rope_scaling out"
        )
    original = int(text.max_position_embeddings)
    text.rope_parameters = {**present, "original_max_position_embeddings": original, **scaling}
    text.max_position_embeddings = int(original * scaling["factor"])
