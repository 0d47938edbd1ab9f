"""DistAttention of a step (paper section 4): queries to holders, the local part meanwhile, exact merge of partials."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from distkv_dask.types import Exchanged
from distkv_dask.worker.exchange import Asking, Exchange, indices, merging
from distkv_dask.worker.gang import HomeGang
from distkv_dask.worker.native_exchange import new_exchange
from distkv_dask.worker.plan import Part
from distkv_dask.worker.pool import Pool
from distkv_dask.worker.shard import Shard


class DistAttention:
    """What a model's attention layers call; serves all steps between two changes of the batch.

    All buffers are made once: a layer of a short decode takes tens of microseconds, of which allocations and checks
    would be a large part.

    Parameters
    ----------
    gang
        The running gang, with a channel to every holder in ``parts``.
    parts
        Parts of a step by worker, as :func:`distkv_dask.worker.plan.cut` gives.
    tokens
        New tokens in a step: one for each sequence of the batch, or any number for a single sequence.
    pool
        The home's pool.
    heads
        Query heads of the model.
    step
        Number of the gang's next step.
    """

    def __init__(
        self, gang: HomeGang, parts: Mapping[str, Part], tokens: int, pool: Pool, heads: int, step: int = 0
    ) -> None:
        self.step = step
        """Number of the next step, as the holders count."""
        home = gang.gang.home
        shape = (tokens, heads, pool.head_dim)
        self._local = local = Local(parts[home], tokens, pool, heads) if home in parts else None
        self._sees_all = local is not None and local.index is None
        if local is not None and self._sees_all:
            self._out, self._lse = local.shard.out, local.shard.lse
        else:
            self._out, self._lse = torch.empty(shape, dtype=torch.float32), torch.empty(shape[:2], dtype=torch.float32)
        self._result = self._out if pool.dtype == torch.float32 else torch.empty(shape, dtype=pool.dtype)
        holders = [
            (gang.channels[worker], part)
            for worker, part in sorted(parts.items(), key=_work, reverse=True)  # who takes longest begins first
            if worker != home
        ]
        asking = Asking(gang.gang, holders, pool, self._out, self._lse, not self._sees_all, gang.timeout_receive)
        self._exchange = self._new_exchange(asking) if holders else None
        if local is not None and not self._sees_all:
            local.merges_into(self._out, self._lse)

    @property
    def exchanged(self) -> Exchanged:
        """What was exchanged with holders so far."""
        return Exchanged() if self._exchange is None else self._exchange.exchanged

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Attention of one layer over everything stored and the new tokens, whose KV is appended to the tails.

        Parameters
        ----------
        layer
            Index of the layer.
        q
            Contiguous [tokens, heads, head_dim] in the model's dtype.
        k, v
            Contiguous [tokens, kv_heads, head_dim].
        scale
            Factor of the scores.

        Returns
        -------
        torch.Tensor
            [tokens, heads, head_dim] in the dtype of ``q``; the next layer's call overwrites it.

        Raises
        ------
        ChannelError, GangAbortedError
            A holder failed.
        """
        exchange = self._exchange
        if exchange is not None:
            exchange.ask(layer, self.step, q, k, v, scale)
        elif not self._sees_all:  # a token has several partials here
            self._out.zero_()
            self._lse.fill_(-torch.inf)
        if self._local is not None:
            self._attend_locally(self._local, layer, q, k, v, scale)
        if exchange is not None:
            exchange.gather(layer, self.step)
        return self._result if self._result is self._out else self._result.copy_(self._out)

    def advance(self) -> None:
        """Go on to the next step: what was appended is stored now. Holders do the same after their last layer."""
        self.step += 1
        if self._local is not None:
            self._local.shard.advance()

    def close(self) -> None:
        """Forget the channels (they stay open)."""
        if self._exchange is not None:
            self._exchange.close()

    # What a trace does in another way (:mod:`distkv_dask.worker.traced`)

    def _new_exchange(self, asking: Asking) -> Exchange:
        return new_exchange(asking)

    def _attend_locally(
        self, local: Local, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> None:
        local.attend(layer, q, k, v, scale)


class Local:
    """The home's own part of a step; only :class:`DistAttention` and its trace use it."""

    def __init__(self, part: Part, tokens: int, pool: Pool, heads: int) -> None:
        self.shard = Shard(pool, part.rows, heads)
        self.index, appended = indices(part, tokens)
        self._appended = None if len(appended) == tokens else appended
        self._part = part
        self._merge: Callable[[], None] | None = None

    def merges_into(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Have :meth:`attend` merge its result into these; without, it stays with the shard."""
        self._merge = merging(self._part, out, lse, self.shard.out, self.shard.lse, self.index)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> None:
        """Append and attend."""
        shard, appended = self.shard, self._appended
        if self.index is not None:
            q = q[self.index]
        if appended is not None:
            k, v = k[appended], v[appended]
        shard.attend(layer, q, k, v, scale)
        if self._merge is not None:
            self._merge()


def _work(part: tuple[str, Part]) -> int:
    """Pairs of query and key in a worker's part of a step."""
    return sum(row.queries * (row.length + row.queries * row.appends) for row in part[1].rows)
