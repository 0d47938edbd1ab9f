"""DistAttention of a step (paper section 4): queries to holders, the local part meanwhile, exact merge of partials."""

from __future__ import annotations

import math
import selectors
import time
from collections.abc import Mapping

import torch

from distkv_dask.errors import ChannelTimeoutError
from distkv_dask.kernels import PreparedMerge
from distkv_dask.types import Gang
from distkv_dask.worker.channels.base import Channel
from distkv_dask.worker.channels.frames import Header, Kind
from distkv_dask.worker.gang import HomeGang
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
        self.waiting = 0.0
        """Seconds spent waiting for partials."""
        home = gang.gang.home
        shape = (tokens, heads, pool.head_dim)
        self._local = local = _Local(parts[home], tokens, pool, heads) if home in parts else None
        self._sees_all = local is not None and local.index is None
        if local is not None and self._sees_all:
            self._out, self._lse = local.shard.out, local.shard.lse
        else:
            self._out, self._lse = torch.empty(shape, dtype=torch.float32), torch.empty(shape[:2], dtype=torch.float32)
        self._result = self._out if pool.dtype == torch.float32 else torch.empty(shape, dtype=pool.dtype)
        self._remotes = [
            Remote(gang.channels[worker], gang.gang, part, tokens, pool, heads)
            for worker, part in sorted(parts.items(), key=_work, reverse=True)  # who takes longest begins first
            if worker != home
        ]
        self._limit = gang.timeout_receive
        self._selector = selectors.DefaultSelector() if len(self._remotes) > 1 else None
        for remote in self._remotes:
            remote.merges_into(self._out, self._lse)
            if self._selector is not None:
                self._selector.register(remote.channel, selectors.EVENT_READ, remote)
        if local is not None and not self._sees_all:
            local.merges_into(self._out, self._lse)

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
        for remote in self._remotes:
            self._ask(remote, layer, q, k, v, scale)
        if not self._sees_all:
            self._out.zero_()
            self._lse.fill_(-torch.inf)
        if self._local is not None:
            self._attend_locally(layer, q, k, v, scale)
        if self._selector is not None:
            self._gather(layer)
        elif self._remotes:
            self._receive(self._remotes[0], layer)
        return self._result if self._result is self._out else self._result.copy_(self._out)

    def advance(self) -> None:
        """Go on to the next step: what was appended is stored now. Holders do the same after their last layer."""
        self.step += 1
        if self._local is not None:
            self._local.shard.advance()

    def close(self) -> None:
        """Forget the channels (they stay open)."""
        if self._selector is not None:
            self._selector.close()

    # A layer's parts, apart so that a trace can tell them apart (:mod:`distkv_dask.worker.traced`)

    def _ask(self, remote: Remote, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> None:
        remote.ask(layer, self.step, q, k, v, scale)

    def _attend_locally(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> None:
        assert self._local is not None
        self._local.attend(layer, q, k, v, scale)

    def _select(self, layer: int) -> list[tuple[selectors.SelectorKey, int]]:
        assert self._selector is not None
        began = time.perf_counter()
        events = self._selector.select(self._limit)
        self.waiting += time.perf_counter() - began
        return events

    def _wait(self, remote: Remote, layer: int) -> None:
        began = time.perf_counter()
        remote.receive(layer, self.step)
        self.waiting += time.perf_counter() - began

    def _merge(self, remote: Remote, layer: int) -> None:
        remote.merge()

    def _receive(self, remote: Remote, layer: int) -> None:
        """Wait for a holder's partial and merge it."""
        self._wait(remote, layer)
        self._merge(remote, layer)

    def _gather(self, layer: int) -> None:
        """Wait for the partials of several holders and merge them as they come."""
        missing = {remote.channel.peer for remote in self._remotes}
        while missing:
            events = self._select(layer)
            if not events:
                raise ChannelTimeoutError(
                    f"no answer from {', '.join(sorted(missing))} within {self._limit:g} s; they may be frozen or cut "
                    "off. If they are only slow, raise distkv.timeouts.receive"
                )
            for key, _ in events:
                self._receive(key.data, layer)
                missing.discard(key.data.channel.peer)


class _Local:
    """The home's own part of a step."""

    def __init__(self, part: Part, tokens: int, pool: Pool, heads: int) -> None:
        self.shard = Shard(pool, part.rows, heads)
        self.index, appended = _indices(part, tokens)
        self._appended = None if len(appended) == tokens else appended
        self._merge: PreparedMerge | None = None

    def merges_into(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Have :meth:`attend` merge its result into these; without, it stays with the shard."""
        self._merge = PreparedMerge(out, lse, self.shard.out, self.shard.lse, self.index)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> None:
        """Append and attend."""
        shard, appended = self.shard, self._appended
        if appended is None:
            shard.write(layer, k, v)
        elif shard.appended:
            shard.write(layer, k[appended], v[appended])
        shard.attend(layer, q if self.index is None else q[self.index], scale)
        if self._merge is not None:
            self._merge()


class Remote:
    """One holder's part of a step, seen from the home; only :class:`DistAttention` and its trace use it."""

    def __init__(self, channel: Channel, gang: Gang, part: Part, tokens: int, pool: Pool, heads: int) -> None:
        self.channel = channel
        self.merge: PreparedMerge
        """Merges the received partial; see :meth:`merges_into`."""
        self._index, appended = _indices(part, tokens)
        self._appended = None if len(appended) == tokens else appended
        queries, d = sum(row.queries for row in part.rows), pool.head_dim
        kv_shape = (2, len(appended), pool.kv_heads, d)
        question = torch.empty(queries * heads * d + math.prod(kv_shape), dtype=pool.dtype)
        self._q = question[: queries * heads * d].view(queries, heads, d)
        self._k, self._v = question[queries * heads * d :].view(kv_shape)
        self._question = _bytes(question)
        self._gang, self._epoch = gang.number, gang.epoch
        answer = torch.empty(queries * heads * (d + 1), dtype=torch.float32)
        self._out = answer[: queries * heads * d].view(queries, heads, d)
        self._lse = answer[queries * heads * d :].view(queries, heads)
        self._answer = _bytes(answer)

    @property
    def asked_bytes(self) -> int:
        """Bytes of a question."""
        return len(self._question)

    @property
    def answer_bytes(self) -> int:
        """Bytes of a partial."""
        return len(self._answer)

    def merges_into(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Have :attr:`merge` merge into these."""
        self.merge = PreparedMerge(out, lse, self._out, self._lse, self._index)

    def ask(self, layer: int, step: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> None:
        """Send the queries, and the KV of tokens that belong to a tail there."""
        _take(q, self._index, self._q)
        if len(self._k):
            _take(k, self._appended, self._k)
            _take(v, self._appended, self._v)
        question = self._question
        header = Header(Kind.ATTEND, self._gang, self._epoch, layer, step, len(question), scale)
        self.channel.send(header, question)

    def receive(self, layer: int, step: int) -> None:
        """Wait for the partial."""
        answer = self._answer
        self.channel.recv_into(Header(Kind.PARTIAL, self._gang, self._epoch, layer, step, len(answer)), answer)


def _work(part: tuple[str, Part]) -> int:
    """Pairs of query and key in a worker's part of a step."""
    return sum(row.queries * (row.length + row.queries * row.appends) for row in part[1].rows)


def _indices(part: Part, tokens: int) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Tokens of the batch that a part sees (None: all), and those that it appends."""
    if part.rows[0].queries == tokens:  # the only sequence
        return None, torch.arange(tokens if part.rows[0].appends else 0)
    index = None if len(part.places) == tokens else torch.tensor(part.places)
    places = [place for place, row in zip(part.places, part.rows, strict=True) if row.appends]
    return index, torch.tensor(places, dtype=torch.int64)


def _take(tensor: torch.Tensor, index: torch.Tensor | None, taken: torch.Tensor) -> None:
    """Copy a tensor, or the rows of it that ``index`` names."""
    if index is None:
        taken.copy_(tensor)
    else:
        torch.index_select(tensor, 0, index, out=taken)


def _bytes(tensor: torch.Tensor) -> memoryview:
    """Bytes of a contiguous CPU tensor, without a copy."""
    return tensor.view(torch.uint8).numpy().data
