"""The contract of a step's exchange with its holders: its questions, and the errors that both implementations raise.

Layer by layer, queries go out, partials come in, and each is merged as soon as all earlier ones in order have arrived.
In C++: :mod:`~distkv_dask.worker.home.native_exchange`; over any channel, for any device:
:mod:`~distkv_dask.worker.home.python_exchange`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from distkv_dask.errors import ChannelTimeoutError
from distkv_dask.gang import Exchanged, Gang
from distkv_dask.kernels import PreparedMerges
from distkv_dask.worker.blocks.pool import Pool
from distkv_dask.worker.channels.base import Channel
from distkv_dask.worker.device import Device
from distkv_dask.worker.plan import Part, Run


@dataclass(frozen=True, slots=True)
class Asking:
    """The questions of a step to its holders, and where their partials are merged.

    ``out`` [tokens, heads, value_dim] and ``lse`` [tokens, heads] are float32, and empty at the start of each layer.
    ``order`` is the order of merging, by worker. ``local`` are the home's own partials, if it has any: float32
    [queries, heads, value_dim] and [queries, heads]. ``limit`` is the time limit for partials in seconds. On a card
    ``together`` merges all partials of a layer at once; those of holders are then in ``memory``, float32 [n], in the
    order of the holders.
    """

    gang: Gang
    holders: Sequence[tuple[str, Channel, Part]]
    pool: Pool
    out: torch.Tensor
    lse: torch.Tensor
    order: Sequence[Run]
    local: tuple[torch.Tensor, torch.Tensor] | None
    limit: float
    together: PreparedMerges | None = None
    memory: torch.Tensor | None = None


class Exchange(Protocol):
    """Serves all layers of the steps between two changes of the batch."""

    @property
    def exchanged(self) -> Exchanged:
        """What was exchanged so far."""

    def ask(self, layer: int, step: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> None:
        """Send the queries [tokens, heads, head_dim], and new KV [tokens, kv_heads, head_dim] of tails elsewhere.

        Holders without visible KV in this layer are not asked.
        """

    def gather(self, layer: int, step: int) -> None:
        """Wait for the partials of all holders, and merge each as soon as all earlier ones in order have arrived.

        The home's own are there already.
        """

    def close(self) -> None:
        """Forget the channels (they stay open)."""


def indices(part: Part, tokens: int) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Tokens of the step that a part has queries for (None: all, each once), and those that it appends; int64."""
    index = None if part.tokens == tuple(range(tokens)) else torch.tensor(part.tokens, dtype=torch.int64)
    appended: list[int] = []
    first = 0
    for row in part.rows:
        appended += part.tokens[first : first + row.queries] if row.appends else ()
        first += row.queries
    return index, torch.tensor(appended, dtype=torch.int64)


def placed_indices(part: Part, tokens: int, device: Device) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
    """The same on a device, None for all of the step's tokens; and how many are appended."""
    index, appended = indices(part, tokens)
    there = None if index is None else device.put(index)
    return there, None if len(appended) == tokens else device.put(appended), len(appended)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Bytes of a contiguous CPU tensor, without a copy."""
    return tensor.view(torch.uint8).numpy().data


def late(missing: set[str], limit: float) -> ChannelTimeoutError:
    """Error for holders whose partials did not come in time."""
    return ChannelTimeoutError(
        f"no answer from {', '.join(sorted(missing))} within {limit:g} s; they may be frozen or cut "
        "off. If they are only slow, raise distkv.timeouts.receive"
    )
