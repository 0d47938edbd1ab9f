"""A worker's part of a batch: append new KV to its tails, then MicroAttention over its spans."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from distkv_dask.errors import PlanError
from distkv_dask.geometry import LayerKind
from distkv_dask.kernels import PreparedAttention, PreparedLayers
from distkv_dask.worker.asked_layers import asked_layers
from distkv_dask.worker.blocks.pool import Pool
from distkv_dask.worker.channels.bodies import Row
from distkv_dask.worker.first_keys import FirstKeys


class Shard:
    """Rows of a batch at one worker, with index tensors that serve all layers of a step.

    Parameters
    ----------
    pool
        The worker's pool.
    rows
        The rows, in the order of their queries.
    heads
        Query heads of the model.
    result
        Memory for :attr:`result`; None: its own.

    Raises
    ------
    PlanError
        A row's tokens are not in the pool, or have no room there.
    """

    def __init__(self, pool: Pool, rows: Sequence[Row], heads: int, result: torch.Tensor | None = None) -> None:
        self._pool = pool
        self.layers = pool.layers
        """Layers of the model."""
        self.asked = asked_layers(rows, pool.layer_kinds)
        """Layers in which the rows see KV here, or append."""
        self._rows = list(rows)
        self.tokens = sum(row.queries for row in rows)
        """Queries of all rows."""
        self.appended = sum(row.queries for row in rows if row.appends)
        """Tokens whose KV is appended here in each step."""
        self._tables = tables = [pool.find(row.sequence, row.spans) for row in rows]
        for row, table in zip(rows, tables, strict=True):
            self._check_room(row, table)
        # on the host, where kernels of any device read them once per step
        self._visible, self._starts = torch.empty(2, len(rows), dtype=torch.int32)
        self._slots = torch.empty(2, self.appended, dtype=torch.int64)
        kinds = list(dict.fromkeys(pool.layer_kinds))
        self._first = FirstKeys(rows, kinds) if any(kind.visible != "full" for kind in kinds) else None
        self.full = False
        """Whether steps so far have used up a row's room."""
        self._prepare()
        attentions = self._attentions(kinds, heads, result)
        self.out, self.lse = attentions[0].out, attentions[0].lse
        """float32 [tokens, heads, head_dim] and [tokens, heads]: results of the last :meth:`attend`."""
        self.result = attentions[0].result
        """float32: ``out``, then ``lse``, in one piece of memory."""
        layers = range(pool.layers)
        self._attend = PreparedLayers(
            attentions,
            [kinds.index(kind) for kind in pool.layer_kinds],
            [pool.keys(at) for at in layers],
            [pool.values(at) for at in layers],
            *self._slots,
        )
        self.native = self._attend.native
        """The batch prepared for the kernels' core; None if that is not used."""
        self.queued = self._attend.queued
        """Whether :meth:`attend` only queues work on a card, always in the same memory."""

    def _attentions(
        self, kinds: Sequence[LayerKind], heads: int, result: torch.Tensor | None
    ) -> list[PreparedAttention]:
        """Attention of each kind of layer; all have their results in the same memory."""
        rows, pool = self._rows, self._pool
        width = max(map(len, self._tables), default=0)
        padded = [table + [0] * (width - len(table)) for table in self._tables]
        blocks = torch.tensor(padded, dtype=torch.int32).view(len(rows), width)
        offsets: torch.Tensor | None = None
        if self.tokens > len(rows):
            offsets = torch.tensor([0, *accumulate(row.queries for row in rows)], dtype=torch.int32)
        causal = any(row.appends and row.queries > 1 for row in rows)
        attentions: list[PreparedAttention] = []
        for kind in kinds:
            attentions.append(
                PreparedAttention(
                    self.tokens, heads, pool.keys(0), pool.values(0), blocks, self._visible,
                    query_offsets=offsets, causal=causal, q_start=self._starts if causal else None,
                    first_keys=None if self._first is None else self._first.tensors.get(kind),
                    soft_cap=kind.soft_cap, result=attentions[0].result if attentions else result,
                )
            )  # fmt: skip
        return attentions

    def attend(self, layer: int, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> None:
        """Append, then attend: :attr:`out` and :attr:`lse` are overwritten.

        Parameters
        ----------
        layer
            Index of the layer.
        q
            [tokens, heads, head_dim] in the pool's dtype.
        keys, values
            [appended, kv_heads, head_dim], of the rows that append here.
        scale
            Factor of the scores.

        Raises
        ------
        PlanError
            Steps so far have used up a row's room.
        """
        if self.full:
            for row, table in zip(self._rows, self._tables, strict=True):
                self._check_room(row, table)
        self._attend(layer, q, keys, None if self._pool.latent_dim else values, scale)

    def advance(self) -> None:
        """Advance to the next step: appended tokens now count as stored."""
        self._rows = [row._replace(length=row.length + row.queries) if row.appends else row for row in self._rows]
        if self._first is not None:
            self._first.advance()
        if self.appended:
            self._prepare()
        if not self.full and (self.appended or self._first is not None):
            self._attend.refresh()

    def _prepare(self) -> None:
        """Make the index tensors of a step, unless the last step has used up a row's room."""
        pool, rows = self._pool, self._rows
        both = list(zip(rows, self._tables, strict=True))
        self.full = any(row.length + row.queries * row.appends > self._room(table) for row, table in both)
        if not self.full:
            slots = [pool.slots(table, row.length, row.length + row.queries) for row, table in both if row.appends]
            self._slots[0] = torch.tensor([block for blocks, _ in slots for block in blocks])
            self._slots[1] = torch.tensor([offset for _, offsets in slots for offset in offsets])
        self._visible[:] = torch.tensor([row.length + row.queries * row.appends for row in rows])
        self._starts[:] = torch.tensor([row.length for row in rows])

    def _room(self, table: Sequence[int]) -> int:
        return len(table) * self._pool.block_tokens

    def _check_room(self, row: Row, table: Sequence[int]) -> None:
        if row.length + row.queries * row.appends > (room := self._room(table)):
            raise PlanError(
                f"sequence {row.sequence} has room for {room} tokens on this worker, but {row} was planned here; "
                "this is a fault of the plan, please report it",
                row.sequence,
            )
