"""DistAttention of a step (paper section 4): queries to holders, the local part in parallel, exact merge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from distkv_dask.gang import Exchanged
from distkv_dask.kernels import PreparedMerges, merge_sinks
from distkv_dask.worker.blocks.pool import Pool
from distkv_dask.worker.home.exchange import Asking, Exchange, placed_indices
from distkv_dask.worker.home.gang import HomeGang
from distkv_dask.worker.home.native_exchange import new_exchange
from distkv_dask.worker.plan import Part, merge_order
from distkv_dask.worker.shard import Shard
from distkv_dask.worker.showing import Showing

if TYPE_CHECKING:
    from distkv_dask.worker.stages.links import StageStep


class DistAttention:
    """What a model's attention layers call; serves all steps between two changes of the batch.

    All buffers are made once: a layer of a short decode takes tens of microseconds, and allocations and checks would be
    a large part of that.

    Parameters
    ----------
    gang
        The running gang, with a channel to every holder in ``parts``; None if everything is at the home.
    parts
        Parts of a step by worker, as :func:`distkv_dask.worker.plan.cut` gives.
    tokens
        New tokens in a step, of all sequences of the batch.
    pool
        The home's pool.
    heads
        Query heads of the model.
    """

    def __init__(self, gang: HomeGang | None, parts: Mapping[str, Part], tokens: int, pool: Pool, heads: int) -> None:
        self.step = 0
        """Number of the next step, as the holders count."""
        self.showing: Showing | None = None
        """Tells the holder lane which layers are stored, if later chunks may follow."""
        self.further: StageStep | None = None
        """Sends hidden states through further stages, if other workers have layers."""
        self._pool = pool
        home = gang.gang.home if gang is not None else next(iter(parts))
        shape = (tokens, heads, pool.value_dim)
        memory = None if pool.device.is_host or parts.keys() <= {home} else _memory(parts, heads, pool)
        size = len(parts[home].tokens) * heads * (pool.value_dim + 1) if home in parts else 0
        own, theirs = (None, None) if memory is None else (memory[:size], memory[size:])
        self._local = local = Local(parts[home], tokens, pool, heads, own) if home in parts else None
        self._exchange: Exchange | None = None
        self._merge: PreparedMerges | None = None
        if local is not None and local.index is None and len(parts) == 1:
            self._out, self._lse = local.shard.out, local.shard.lse
        else:
            self._out = torch.empty(shape, dtype=torch.float32, device=pool.device.torch)
            self._lse = torch.empty(shape[:2], dtype=torch.float32, device=pool.device.torch)
            self._begin_merging(gang, home, parts, memory, theirs)
        self._result = self._out if pool.dtype == torch.float32 else torch.empty_like(self._out, dtype=pool.dtype)

    def _begin_merging(
        self,
        gang: HomeGang | None,
        home: str,
        parts: Mapping[str, Part],
        memory: torch.Tensor | None,
        theirs: torch.Tensor | None,
    ) -> None:
        """Build the merge of the partials, in an order that depends neither on time nor on the rest of the batch.

        On a card with holders, ``memory`` takes all partials: the home's own, then ``theirs``.
        """
        order, channels = merge_order(parts), {} if gang is None else gang.channels
        local = None if self._local is None else (self._local.shard.out, self._local.shard.lse)
        holders = [
            (worker, channels[worker], part)
            for worker, part in sorted(parts.items(), key=_work, reverse=True)  # the slowest begins first
            if worker != home
        ]
        if not holders and self._local is not None:
            memory = self._local.shard.result
        together = None
        if memory is not None:
            sources = [*([home] if local is not None else []), *(worker for worker, _, _ in holders)]
            queries = [len(parts[worker].tokens) for worker in sources]
            runs = [(sources.index(one.worker), one.query, one.token, one.queries) for one in order]
            together = PreparedMerges(self._out, self._lse, memory, queries, runs)
        if holders and gang is not None:
            limit = gang.timeout_receive
            merged = self._out, self._lse, order, local
            asking = Asking(gang.gang, holders, self._pool, *merged, limit, together, theirs)
            self._exchange = self._new_exchange(asking)
        else:
            self._merge = together

    @property
    def queued(self) -> bool:
        """Whether :meth:`attend` only queues work on a card, always in the same memory, and never waits."""
        return self._exchange is None and self.further is None and (self._local is None or self._local.shard.queued)

    @property
    def exchanged(self) -> Exchanged:
        """What was exchanged with holders so far."""
        if self.further is not None:
            return self.further.exchanged
        return Exchanged() if self._exchange is None else self._exchange.exchanged

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Attention of one layer over everything stored and the new tokens, whose KV is appended to the tails.

        Parameters
        ----------
        layer
            Index of the layer.
        q
            Contiguous [tokens, heads, head_dim] in the model's dtype.
        k, v
            Contiguous [tokens, kv_heads, head_dim] and [tokens, kv_heads, value_dim].
        scale
            Factor of the scores.
        sinks
            [heads], if the layer has them: scores of a key that every query sees, with a value of zero.

        Returns
        -------
        torch.Tensor
            [tokens, heads, value_dim] in the dtype of ``q``; the next layer's call overwrites it.

        Raises
        ------
        ChannelError, GangAbortedError
            A holder failed.
        """
        exchange = self._exchange
        if exchange is not None:
            exchange.ask(layer, self.step, q, k, v, scale)
        if self._local is not None:
            self._attend_locally(self._local, layer, q, k, v, scale)
        if self.showing is not None:
            self.showing.stored(layer)
        if exchange is not None:
            exchange.gather(layer, self.step)
        if self._merge is not None:  # a token has several partials here
            self._merge()
        if sinks is not None:
            merge_sinks(self._out, self._lse, sinks)
        return self._result if self._result is self._out else self._result.copy_(self._out)

    def advance(self) -> None:
        """Advance to the next step: appended tokens now count as stored. Holders do the same after their last layer."""
        self.step += 1
        if self.further is not None:
            self.further.advance()
        if self._local is not None:
            self._local.shard.advance()

    def close(self) -> None:
        """Forget the channels (they stay open)."""
        if self.further is not None:
            self.further.close()
        if self._exchange is not None:
            self._exchange.close()

    # A trace overrides these (:mod:`distkv_dask.worker.home.traced`)

    def _new_exchange(self, asking: Asking) -> Exchange:
        return new_exchange(asking)

    def _attend_locally(
        self, local: Local, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> None:
        local.attend(layer, q, k, v, scale)


class Local:
    """The home's own part of a step; only :class:`DistAttention` and its trace use it."""

    def __init__(self, part: Part, tokens: int, pool: Pool, heads: int, result: torch.Tensor | None) -> None:
        self.shard = Shard(pool, part.rows, heads, result)
        self.index, self._appended, self._new = placed_indices(part, tokens, pool.device)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> None:
        """Append and attend; the partials are the shard's."""
        shard, appended = self.shard, self._appended
        if self.index is not None:
            q = q[self.index]
        if not self._new:
            k, v = k[:0], v[:0]
        elif appended is not None:
            k, v = k[appended], v[appended]
        shard.attend(layer, q, k, v, scale)


def _memory(parts: Mapping[str, Part], heads: int, pool: Pool) -> torch.Tensor:
    """Memory on a card for the partials of all members, float32 [n]: they are merged at once there."""
    queries = sum(len(part.tokens) for part in parts.values())
    size = queries * heads * (pool.value_dim + 1)
    return torch.empty(size, dtype=torch.float32, device=pool.device.torch)


def _work(part: tuple[str, Part]) -> int:
    """Pairs of query and key in a worker's part of a step."""
    return sum(row.queries * (row.length + row.queries * row.appends) for row in part[1].rows)
