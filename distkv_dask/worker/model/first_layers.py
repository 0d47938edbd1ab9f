"""A model cut down to its first layers for a while: enough to have one of each kind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from distkv_dask.geometry import Geometry

_LEAST = 2


@contextmanager
def first_layers(model: Any, geometry: Geometry) -> Iterator[nn.ModuleList | None]:
    """Keep only the layers up to the first one of the last kind; yields them, or None if no layers are found.

    Parameters
    ----------
    model
        A transformers model.
    geometry
        Its sizes.
    """
    count = model.config.get_text_config().num_hidden_layers
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    if not found:
        yield None
        return
    parent, name, layers = max(found, key=lambda one: sum(weight.numel() for weight in one[2].parameters()))
    kinds = [_kind(model.config.get_text_config(), geometry, layer, at) for at, layer in enumerate(layers)]
    kept = max(_LEAST, max(kinds.index(kind) for kind in kinds) + 1)
    few = nn.ModuleList(layers[:kept])
    setattr(parent, name, few)
    try:
        yield few
    finally:
        setattr(parent, name, layers)


def _kind(config: Any, geometry: Geometry, layer: nn.Module, at: int) -> tuple[Any, ...]:
    """The kind of a layer: what it sees, the shapes of its weights, and values in lists with an entry per layer."""
    shapes = tuple((name, tuple(weight.shape)) for name, weight in layer.named_parameters())
    count = config.num_hidden_layers
    lists = (repr(value[at]) for value in vars(config).values() if isinstance(value, list) and len(value) == count)
    return (shapes, geometry.layer_kinds[at : at + 1], *lists)
