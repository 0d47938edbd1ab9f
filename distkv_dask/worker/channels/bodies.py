"""Bodies of HELLO, BEGIN and BATCH frames: msgpack, checked on arrival (nothing from the network is unpickled)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import msgpack

from distkv_dask.errors import ChannelError

if TYPE_CHECKING:
    from typing_extensions import Buffer

DIGEST_BYTES = hashlib.sha256().digest_size
_TOP = 2**62


class Row(NamedTuple):
    """One sequence's part of a step at one worker.

    ``length`` tokens of the sequence are stored there before the step; ``queries`` new tokens attend to them; with
    ``appends`` these tokens' KV is stored there too, after the others, and attention among them is causal. ``spans``
    are the sequence's token ranges that the worker has room for so far, in order: all but the last are full.
    ``positions`` are the first positions of the sequences that the row joins, if each has the same number of new
    tokens; otherwise the positions of all tokens.
    """

    sequence: int
    length: int
    queries: int
    appends: bool
    spans: tuple[tuple[int, int], ...]
    positions: tuple[int, ...]


class Hello(NamedTuple):
    """The peer that opens a channel, its engine, and the model geometry of its frames.

    ``layer_kinds`` is a line of :func:`distkv_dask.geometry.describe_kinds`.
    """

    engine: str
    home: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    layer_kinds: str
    latent_dim: int


def token_digest(token: bytes) -> bytes:
    """The digest of the engine's random token in a HELLO frame."""
    return hashlib.sha256(token).digest()


def encode_hello(token: bytes, hello: Hello) -> bytes:
    """Payload of a HELLO frame: the token's digest, then the rest."""
    body: bytes = msgpack.packb(hello)
    return token_digest(token) + body


def decode_hello(payload: Buffer) -> Hello:
    """Read the payload of a HELLO frame whose digest was correct.

    Raises
    ------
    ChannelError
        It is not the format of :func:`encode_hello`.
    """
    fields = _unpack(memoryview(payload)[DIGEST_BYTES:])
    kinds = (str, str, int, int, int, int, str, str, int)
    if len(fields) != len(kinds) or any(type(got) is not kind for got, kind in zip(fields, kinds, strict=True)):
        raise ChannelError(f"a HELLO frame carries {fields!r}; engine, home and model geometry are expected")
    return Hello(*fields)


def encode_rows(rows: Iterable[Row]) -> bytes:
    """Payload of a BEGIN or BATCH frame."""
    body: bytes = msgpack.packb(list(rows))
    return body


def decode_rows(payload: Buffer) -> list[Row]:
    """Read the payload of a BEGIN or BATCH frame.

    Raises
    ------
    ChannelError
        It is not the format of :func:`encode_rows`.
    """
    rows = []
    for fields in _unpack(payload):
        if not isinstance(fields, list) or [type(field) for field in fields] != [int, int, int, bool, list, list]:
            expected = "sequence, length, queries, appends, spans, positions are expected"
            raise ChannelError(f"a batch carries the row {fields!r}; {expected}")
        row = Row(*fields)._replace(spans=_spans(fields[4]), positions=_positions(fields[5], fields[2]))
        if not (0 <= row.sequence < _TOP and 0 <= row.length < _TOP and 1 <= row.queries < 2**31):
            raise ChannelError(f"a batch carries {row}, whose numbers are invalid")
        rows.append(row)
    return rows


def _spans(fields: list[Any]) -> tuple[tuple[int, int], ...]:
    """Token ranges of a row, in ascending order."""
    pairs = all(isinstance(span, list) and [type(end) for end in span] == [int, int] for span in fields)
    ends = [end for span in fields for end in span] if pairs else []
    if not pairs or ends != sorted(ends) or (ends and not 0 <= ends[0] <= ends[-1] < _TOP):
        raise ChannelError(f"a batch carries the spans {fields!r}; ascending pairs of tokens are expected")
    return tuple((start, stop) for start, stop in fields)


def _positions(fields: list[Any], queries: int) -> tuple[int, ...]:
    """First positions of the sequences of a row."""
    plain = all(type(one) is int and 0 <= one < _TOP for one in fields)
    if not plain or not fields or queries % len(fields):
        raise ChannelError(
            f"a batch carries the positions {fields!r:.200} for {queries} queries; one a sequence is expected"
        )
    return tuple(fields)


def _unpack(payload: Buffer) -> list[Any]:
    try:
        body = msgpack.unpackb(payload)
    except ValueError as error:
        raise ChannelError(f"a frame's body is not msgpack ({error})") from error
    if not isinstance(body, list):
        raise ChannelError(f"a frame's body is a {type(body).__name__}; a list is expected")
    return body
