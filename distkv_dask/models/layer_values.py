"""A value of a configuration that may differ from layer to layer."""

from __future__ import annotations

from typing import Any


def layers_of(config: Any) -> list[Any]:
    """A transformers configuration for each layer if they differ, else the one of all layers."""
    return list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else [config]


def layer_values(config: Any, key: str) -> list[Any]:
    """The values of ``key`` in a transformers configuration: each value of a layer once, None for layers without.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> layer_values(SimpleNamespace(head_dim=64), "head_dim")
    [64]
    >>> layer_values(SimpleNamespace(intermediate_size=[128, 256, 128]), "intermediate_size")
    [128, 256]
    """
    values: list[Any] = []
    for layer in layers_of(config):
        value = getattr(layer, key, None)
        for one in value if isinstance(value, list | tuple) and value else [value]:
            if one not in values:
                values.append(one)
    return values
