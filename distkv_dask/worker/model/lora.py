"""LoRA without merging: products of low rank are added to some rows of a linear's result.

One forward may have rows of several adapters, and rows of none, each in its own run (as in Punica, arXiv
2310.18547). The model's own weights are never changed, so packed linears, tiles and layers from disk stay as they are.
As in peft, the weights of an adapter and its contributions are float32.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from distkv_dask.errors import ModelError
from distkv_dask.worker.model.row_tiles import TiledLinear, linear_sizes

_here = threading.local()
"""The rows of the forward that runs on this thread."""


class LoraWeights(NamedTuple):
    """An adapter's contribution to a linear: ``up`` after ``down``, times ``scaling``.

    Parameters
    ----------
    down, up
        float32 [rank, in] and [out, rank].
    scaling
        A factor.
    """

    down: Tensor
    up: Tensor
    scaling: float


@dataclass(slots=True)
class PlacedAdapter:
    """An adapter on the model's device.

    Parameters
    ----------
    added
        By the name of a linear, its contribution to rows [n, in]: [n, out].
    nbytes
        Bytes of its weights.
    """

    added: dict[str, Callable[[Tensor], Tensor]]
    nbytes: int


class Run(NamedTuple):
    """Tokens ``[start, stop)`` of a forward that have an adapter."""

    adapter: PlacedAdapter
    start: int
    stop: int


@dataclass(slots=True)
class AdaptedRows:
    """The adapter of each of a forward's tokens; tokens that are in no run have none.

    Parameters
    ----------
    runs
        Tokens that have one.
    tokens
        All tokens of the forward.
    computed
        Names of the linears that were computed so far.
    """

    runs: Sequence[Run] = ()
    tokens: int = 0
    computed: set[str] = field(default_factory=set)


def adapted_rows(counts: Sequence[tuple[PlacedAdapter | None, int]]) -> AdaptedRows:
    """The rows of a forward, from the adapter and the number of tokens of each sequence in its order."""
    runs: list[Run] = []
    at = 0
    for adapter, count in counts:
        if adapter is not None and runs and runs[-1].adapter is adapter and runs[-1].stop == at:
            runs[-1] = Run(adapter, runs[-1].start, at + count)
        elif adapter is not None and count:
            runs.append(Run(adapter, at, at + count))
        at += count
    return AdaptedRows(runs, at)


@contextmanager
def adapting(rows: AdaptedRows) -> Iterator[None]:
    """Let forwards on this thread add the adapters' contributions, inside a ``with`` statement."""
    if not rows.runs:
        yield
        return
    _here.rows = rows
    try:
        yield
    finally:
        _here.rows = None


def placed(weights: dict[str, LoraWeights], device: torch.device, alike: bool) -> PlacedAdapter:
    """Bring an adapter to a device.

    Parameters
    ----------
    weights
        By the name of a linear.
    device
        The model's.
    alike
        Whether a row's bits must not depend on how many others are computed with it (``distkv.deterministic``).
    """
    there = {name: LoraWeights(one.down.to(device), one.up.to(device), one.scaling) for name, one in weights.items()}
    added: dict[str, Callable[[Tensor], Tensor]] = {
        name: partial(_added_alike, _tiled(one.down), _tiled(one.up), one.scaling) if alike else partial(_added, one)
        for name, one in there.items()
    }
    return PlacedAdapter(added, sum(one.down.nbytes + one.up.nbytes for one in there.values()))


def watch_linear(name: str, linear: nn.Module) -> Any:
    """Let a linear of the model add adapters' contributions; returns the handle that removes this."""
    return linear.register_forward_hook(partial(_add, name))


def _added(weights: LoraWeights, rows: Tensor) -> Tensor:
    return functional.linear(functional.linear(rows, weights.down), weights.up) * weights.scaling


def _tiled(weight: Tensor) -> TiledLinear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return TiledLinear(partial(functional.linear, weight=weight), linear_sizes(linear))


def _added_alike(down: TiledLinear, up: TiledLinear, scaling: float, rows: Tensor) -> Tensor:
    product: Tensor = up(down(rows)) * scaling
    return product


def _add(name: str, linear: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> Tensor | None:
    """After a linear has computed: add the contributions of adapters to their rows."""
    rows: AdaptedRows | None = getattr(_here, "rows", None)
    if rows is None:
        return None
    flat, added_to = given[0].flatten(0, -2), result.view(-1, result.shape[-1])
    if len(flat) != rows.tokens:
        raise ModelError(
            f"the model computes {name} for {len(flat)} rows in a step of {rows.tokens} tokens: adapters of this layer "
            "cannot be computed; merge the adapter into the model (peft's merge_and_unload)"
        )
    rows.computed.add(name)
    for adapter, start, stop in rows.runs:
        if (function := adapter.added.get(name)) is not None:
            some = added_to[start:stop]
            some.copy_(some + function(flat[start:stop].float()))
    return result
