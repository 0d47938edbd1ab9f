"""Bodies of BATCH frames to stages: rows, their tokens, and the blocks that hold them. Checked on arrival."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgpack

from distkv_dask.errors import ChannelError
from distkv_dask.worker.channels.bodies import decode_rows
from distkv_dask.worker.plan import Part

if TYPE_CHECKING:
    from typing_extensions import Buffer


class StageBatch(NamedTuple):
    """The work of a stage in the next steps: a step's part, its number of tokens, and the blocks of each row.

    Batches with numbers in ``over`` have no more steps.
    """

    part: Part
    tokens: int
    blocks: tuple[tuple[int, ...], ...]
    over: tuple[int, ...] = ()


def encode_batch(batch: StageBatch) -> bytes:
    """Payload of a BATCH frame to a stage."""
    part, tokens, blocks, over = batch
    body: bytes = msgpack.packb([tokens, part.tokens, blocks, msgpack.packb(part.rows), over])
    return body


def decode_batch(payload: Buffer, capacity: int) -> StageBatch:
    """Read it: blocks are below ``capacity``, and every token is in a row, so that no number makes us allocate memory.

    Raises
    ------
    ChannelError
        It is not the format of :func:`encode_batch`.
    """
    try:
        tokens, places, blocks, packed, over = msgpack.unpackb(payload)
        rows = decode_rows(packed)
        fits = (
            type(tokens) is int
            and 0 < tokens <= len(places)
            and all(type(at) is int for at in places)
            and {*places} == {*range(tokens)}
            and len(places) == sum(row.queries for row in rows)
            and len(blocks) == len(rows)
            and all(type(block) is int and 0 <= block < capacity for some in blocks for block in some)
            and all(type(one) is int for one in over)
        )
    except (ValueError, TypeError) as error:
        raise ChannelError(f"a batch for a stage is malformed: {error}") from error
    if not fits:
        raise ChannelError(f"a batch for a stage has {len(places)} tokens and {len(rows)} rows that do not fit")
    return StageBatch(Part(tuple(rows), tuple(places)), tokens, tuple(map(tuple, blocks)), tuple(over))
