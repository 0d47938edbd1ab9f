"""Layers in which a holder is queried: a layer's window may begin after everything that the holder has."""

from __future__ import annotations

from collections.abc import Sequence

from distkv_dask.geometry import LayerKind
from distkv_dask.worker.channels.bodies import Row


def asked_layers(rows: Sequence[Row], kinds: Sequence[LayerKind]) -> tuple[int, ...]:
    """Layers in which some row's first query sees KV on this worker, or in which KV is appended here.

    Both ends of a channel compute the same layers from the same rows. Later queries see less, so a layer that is left
    out is not needed in later steps either.

    Parameters
    ----------
    rows
        The part's rows.
    kinds
        The kind of each layer.

    Examples
    --------
    >>> rows = [Row(1, 8, 1, False, ((0, 8),), (20,))]
    >>> asked_layers(rows, [LayerKind(), LayerKind("sliding", 12), LayerKind("sliding", 14)])
    (0, 2)
    """
    sees = {
        kind: any(row.appends or row.spans[-1][1] > kind.first(min(row.positions)) for row in rows)
        for kind in dict.fromkeys(kinds)
    }
    return tuple(layer for layer, kind in enumerate(kinds) if sees[kind])


def next_layers(asked: Sequence[int], layers: int) -> list[int]:
    """The layer queried after each of ``layers``: a step ends if that is not a later one.

    Examples
    --------
    >>> next_layers((1, 3), 5)
    [1, 3, 3, 1, 1]
    """
    first = asked[0] if asked else 0
    return [next((later for later in asked if later > layer), first) for layer in range(layers)]
