"""A stage's side: it computes its layers for the home, in the order in which the home's frames come.

Several batches may be under way, whose steps come in any order; frames name theirs by a number in the place of a layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from distkv_dask.errors import ChannelError
from distkv_dask.worker.channels.base import Inlet
from distkv_dask.worker.channels.frames import HEADER_BYTES, Header, Kind
from distkv_dask.worker.home.attention import DistAttention
from distkv_dask.worker.stages.batches import decode_batch
from distkv_dask.worker.stages.blocks import NamedBlocks

if TYPE_CHECKING:
    from distkv_dask.worker.model.loaded import LoadedModel

_POSITION_BYTES = 8


class _Batch(NamedTuple):
    """A batch under way: its attention, and tokens of a step."""

    attention: DistAttention
    tokens: int


class StageTurns:
    """Computes a stage's layers for one home; used by the holder lane's thread only.

    It keeps nothing of a sequence but KV in blocks that the home names, so there is nothing to free or to move.

    Parameters
    ----------
    model
        Cut down to the stage's layers.
    pool
        Their KV.
    """

    def __init__(self, model: LoadedModel, pool: NamedBlocks) -> None:
        self._model = model
        self._pool = pool
        self._inlet: Inlet | None = None
        self._batches: dict[int, _Batch] = {}
        self._bytes = model.hidden_size * model.dtype.itemsize
        """Bytes of a token's hidden state."""

    def greet(self, inlet: Inlet) -> None:
        """Serve this home from now on: unread frames of an earlier connection no longer change anything."""
        self._inlet, self._batches = inlet, {}

    def handle_frame(self, inlet: Inlet, header: Header, payload: memoryview) -> None:
        """Handle a frame.

        Raises
        ------
        ChannelError
            It is malformed, or of an earlier connection.
        PlanError
            A row has no room in its blocks.
        """
        if inlet is not self._inlet:
            raise ChannelError("the home has opened another channel to this stage since")
        if header.kind is Kind.BATCH:
            self._add_batch(inlet, header.layer, payload)
        elif header.kind is Kind.LAYERS and header.layer in self._batches:
            self._compute(inlet, header, payload, self._batches[header.layer])
        else:
            raise ChannelError(f"{inlet.peer} sent {header}, which a stage does not expect here")

    def _add_batch(self, inlet: Inlet, number: int, payload: memoryview) -> None:
        pool = self._pool
        batch = decode_batch(payload, pool.capacity_blocks)
        for one in batch.over:
            self._batches.pop(one, None)
        rows = zip(batch.part.rows, batch.blocks, strict=True)
        pool.name_blocks((row.sequence, row.spans, blocks) for row, blocks in rows)
        attention = DistAttention(None, {"": batch.part}, batch.tokens, pool, self._model.geometry.heads)
        self._batches[number] = _Batch(attention, batch.tokens)
        inlet.maximum = max(inlet.maximum, batch.tokens * (_POSITION_BYTES + self._bytes))
        inlet.make_room(inlet.maximum)

    def _compute(self, inlet: Inlet, header: Header, payload: memoryview, batch: _Batch) -> None:
        at, size = batch.tokens * _POSITION_BYTES, batch.tokens * (_POSITION_BYTES + self._bytes)
        if len(payload) != size:
            raise ChannelError(f"{inlet.peer} sent {header}; {size} bytes were expected")
        given = inlet.data[HEADER_BYTES : HEADER_BYTES + size]  # the frame stays there until it is answered
        hidden = given[at:].view(self._model.dtype).view(batch.tokens, -1)
        out = self._model.further(hidden, given[:at].view(torch.int64), batch.attention).contiguous()
        batch.attention.advance()
        reply = out.view(-1).view(torch.uint8).numpy().data
        inlet.send(header._replace(kind=Kind.HIDDEN, length=len(reply)), reply)
