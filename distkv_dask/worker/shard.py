"""A worker's part of a batch: append new KV to its tails, then MicroAttention over its spans."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distkv_dask.errors import CapacityError
from distkv_dask.kernels import PreparedAttention
from distkv_dask.worker.pool import Pool
from distkv_dask.worker.wire import Row


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

    Raises
    ------
    CapacityError
        A row's tokens have no room in the pool.
    """

    def __init__(self, pool: Pool, rows: Sequence[Row], heads: int) -> None:
        self._pool = pool
        self._rows = list(rows)
        self.tokens = sum(row.queries for row in rows)
        """Queries of all rows."""
        self.appended = sum(row.queries for row in rows if row.appends)
        """Tokens whose KV is appended here in each step."""
        self._tables = tables = [pool.find(row.sequence, row.spans) for row in rows]
        width = max(map(len, tables), default=0)
        padded = [table + [0] * (width - len(table)) for table in tables]
        offsets: torch.Tensor | None = None
        if self.tokens > len(rows):
            queries = torch.tensor([0, *(row.queries for row in rows)])
            offsets = queries.cumsum(0).to(torch.int32)
        causal = any(row.appends and row.queries > 1 for row in rows)
        for row, table in zip(rows, tables, strict=True):
            self._check_room(row, table)
        self._visible = torch.empty(len(rows), dtype=torch.int32)
        self._starts = torch.empty(len(rows), dtype=torch.int32) if causal else None
        self._slots: tuple[torch.Tensor, torch.Tensor] | None
        self._prepare()
        self._attention = PreparedAttention(
            self.tokens, heads, pool.keys(0), pool.values(0),
            torch.tensor(padded, dtype=torch.int32).view(len(rows), width), self._visible,
            query_offsets=offsets, causal=causal, q_start=self._starts,
        )  # fmt: skip
        self.out, self.lse = self._attention.out, self._attention.lse
        """float32 [tokens, heads, head_dim] and [tokens, heads]: what the last :meth:`attend` gave."""
        self.result = self._attention.result
        """float32: ``out``, then ``lse``, in one piece of memory."""

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Append KV [appended, kv_heads, head_dim] of the rows that append here.

        Raises
        ------
        CapacityError
            Steps so far have used up a row's room.
        """
        if self._slots is None:
            for row, table in zip(self._rows, self._tables, strict=True):
                self._check_room(row, table)
        assert self._slots is not None
        self._pool.write(layer, self._slots, keys, values)

    def attend(self, layer: int, q: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of q [tokens, heads, head_dim]: :attr:`out` and :attr:`lse`, which the next call overwrites."""
        self._attention(q, self._pool.keys(layer), self._pool.values(layer), scale)
        return self.out, self.lse

    def advance(self) -> None:
        """Go on to the next step: what was appended is stored now."""
        self._rows = [row._replace(length=row.length + row.queries) if row.appends else row for row in self._rows]
        if self.appended:
            self._prepare()

    def _prepare(self) -> None:
        """Make the index tensors of a step; none where the last step has used up a row's room."""
        pool, rows, self._slots = self._pool, self._rows, None
        both = list(zip(rows, self._tables, strict=True))
        if all(row.length + row.queries * row.appends <= self._room(table) for row, table in both):
            slots = [pool.slots(table, row.length, row.length + row.queries) for row, table in both if row.appends]
            self._slots = (
                torch.tensor([block for blocks, _ in slots for block in blocks]),
                torch.tensor([offset for _, offsets in slots for offset in offsets]),
            )
        self._visible[:] = torch.tensor([row.length + row.queries * row.appends for row in rows])
        if self._starts is not None:
            self._starts[:] = torch.tensor([row.length for row in rows])

    def _room(self, table: Sequence[int]) -> int:
        return len(table) * self._pool.block_tokens

    def _check_room(self, row: Row, table: Sequence[int]) -> None:
        if row.length + row.queries * row.appends > (room := self._room(table)):
            raise CapacityError(
                f"sequence {row.sequence} has room for {room} tokens on this worker, but {row} was planned here; "
                "this is a fault of the plan, please report it"
            )
