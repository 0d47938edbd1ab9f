"""DistAttention of a step (paper section 4): queries to holders, the local part meanwhile, exact merge of partials."""

from __future__ import annotations

import selectors
import time
from collections.abc import Mapping

import torch

from distkv_dask.errors import ChannelTimeoutError
from distkv_dask.kernels import merge_into
from distkv_dask.types import Gang
from distkv_dask.worker.channels.base import Channel
from distkv_dask.worker.channels.frames import Header, Kind
from distkv_dask.worker.gang import HomeGang
from distkv_dask.worker.plan import Part
from distkv_dask.worker.pool import Pool
from distkv_dask.worker.shard import Shard

Partial = tuple[torch.Tensor, torch.Tensor]
"""out float32 [tokens, heads, head_dim], lse float32 [tokens, heads]."""


class DistAttention:
    """What a model's attention layers call; serves all steps between two changes of the batch.

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
        self._tokens = tokens
        home = gang.gang.home
        self._local = _Local(parts[home], tokens, pool) if home in parts else None
        self._remotes = [
            _Remote(gang.channels[worker], gang.gang, part, tokens, pool, heads)
            for worker, part in parts.items()
            if worker != home
        ]
        self._limit = gang.timeout_receive
        self._selector = selectors.DefaultSelector() if len(self._remotes) > 1 else None
        if self._selector is not None:
            for remote in self._remotes:
                self._selector.register(remote.channel, selectors.EVENT_READ, remote)

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
            [tokens, heads, head_dim] in the dtype of ``q``.

        Raises
        ------
        ChannelError, GangAbortedError
            A holder failed.
        """
        for remote in self._remotes:
            remote.ask(layer, self.step, q, k, v, scale)
        merged = None if self._local is None else self._local.attend(layer, q, k, v, scale)
        if self._selector is not None:
            merged = self._gather(merged, q, layer)
        elif self._remotes:
            merged = self._receive(self._remotes[0], merged, q, layer)
        assert merged is not None
        return merged[0].to(q.dtype)

    def advance(self) -> None:
        """Go on to the next step: what was appended is stored now. Holders do the same after their last layer."""
        self.step += 1
        if self._local is not None:
            self._local.shard.advance()

    def close(self) -> None:
        """Forget the channels (they stay open)."""
        if self._selector is not None:
            self._selector.close()

    def _receive(self, remote: _Remote, merged: Partial | None, q: torch.Tensor, layer: int) -> Partial:
        """Wait for a holder's partial and merge it."""
        began = time.perf_counter()
        remote.receive(layer, self.step)
        self.waiting += time.perf_counter() - began
        return remote.merge(merged, q)

    def _gather(self, merged: Partial | None, q: torch.Tensor, layer: int) -> Partial | None:
        """Wait for the partials of several holders and merge them as they come."""
        assert self._selector is not None
        missing = {remote.channel.peer for remote in self._remotes}
        while missing:
            began = time.perf_counter()
            events = self._selector.select(self._limit)
            self.waiting += time.perf_counter() - began
            if not events:
                raise ChannelTimeoutError(
                    f"no answer from {', '.join(sorted(missing))} within {self._limit:g} s; they may be frozen or cut "
                    "off. If they are only slow, raise distkv.timeouts.receive"
                )
            for key, _ in events:
                merged = self._receive(key.data, merged, q, layer)
                missing.discard(key.data.channel.peer)
        return merged


class _Local:
    """The home's own part of a step."""

    def __init__(self, part: Part, tokens: int, pool: Pool) -> None:
        self.shard = Shard(pool, part.rows)
        self._index, self._appended = _indices(part, tokens)
        self._tokens = tokens

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Partial:
        """Append and attend; tokens with nothing here get (0, -inf)."""
        shard, appended = self.shard, self._appended
        if shard.appended == self._tokens:
            shard.write(layer, k, v)
        elif shard.appended:
            shard.write(layer, k[appended], v[appended])
        if self._index is None:
            return shard.attend(layer, q, scale)
        out, lse = _nothing(q)
        part_out, part_lse = shard.attend(layer, q[self._index], scale)
        out[self._index], lse[self._index] = part_out, part_lse
        return out, lse


class _Remote:
    """One holder's part of a step, seen from the home."""

    def __init__(self, channel: Channel, gang: Gang, part: Part, tokens: int, pool: Pool, heads: int) -> None:
        self.channel = channel
        self._index, self._appended = _indices(part, tokens)
        self._all = tokens
        queries = sum(row.queries for row in part.rows)
        self._appends = sum(row.queries for row in part.rows if row.appends)
        size = (queries * heads + 2 * self._appends * pool.kv_heads) * pool.head_dim * pool.dtype.itemsize
        self._gang, self._epoch, self._size = gang.number, gang.epoch, size
        answer = torch.empty(queries * heads * (pool.head_dim + 1), dtype=torch.float32)
        self._out = answer[: queries * heads * pool.head_dim].view(queries, heads, pool.head_dim)
        self._lse = answer[queries * heads * pool.head_dim :].view(queries, heads)
        self._answer = answer.view(torch.uint8).numpy().data

    def ask(self, layer: int, step: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> None:
        """Send the queries, and the KV of tokens that belong to a tail there."""
        header = Header(Kind.ATTEND, self._gang, self._epoch, layer, step, self._size, scale)
        if self._index is not None:
            q = q[self._index]
        if not self._appends:
            self.channel.send(header, _bytes(q))
            return
        if self._appends < self._all:
            k, v = k[self._appended], v[self._appended]
        self.channel.send(header, _bytes(q), _bytes(k), _bytes(v))

    def receive(self, layer: int, step: int) -> None:
        """Wait for the partial."""
        answer = self._answer
        self.channel.recv_into(Header(Kind.PARTIAL, self._gang, self._epoch, layer, step, len(answer)), answer)

    def merge(self, merged: Partial | None, q: torch.Tensor) -> Partial:
        """Merge the received partial into what there is; it may lend its own memory until the next layer."""
        if merged is None:
            if self._index is None:
                return self._out, self._lse
            merged = _nothing(q)
        merge_into(*merged, self._out, self._lse, self._index)
        return merged


def _indices(part: Part, tokens: int) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Tokens of the batch that a part sees (None: all), and those that it appends."""
    if part.rows[0].queries == tokens:  # the only sequence
        return None, torch.arange(tokens)
    index = None if len(part.places) == tokens else torch.tensor(part.places)
    return index, torch.tensor([place for place, row in zip(part.places, part.rows, strict=True) if row.appends])


def _nothing(q: torch.Tensor) -> Partial:
    out = torch.zeros(q.shape, dtype=torch.float32)
    return out, torch.full(q.shape[:2], -torch.inf)


def _bytes(tensor: torch.Tensor) -> memoryview:
    """Bytes of a contiguous CPU tensor, without a copy."""
    return tensor.view(torch.uint8).numpy().data
