"""Frames: a 64-byte header and a payload of exact length, the unit that channels carry.

Every header names gang, epoch, layer and step, so that a late frame of a failed window is never taken for an answer.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from distkv_dask.errors import ChannelError, ChannelTimeoutError, GangAbortedError, PlanError

if TYPE_CHECKING:
    from typing_extensions import Buffer

_LAYOUT = struct.Struct("<4sBxHIIQQd24x")
_MAGIC = b"DKV1"
HEADER_BYTES = _LAYOUT.size
"""Size of a frame's header; payload tensors start on this boundary."""


class Kind(IntEnum):
    """Kinds of frames. H is sent by the home, A by the holder (which answers)."""

    HELLO = 1
    """H: token, engine and geometry; the first frame of a connection."""
    WELCOME = 2
    """A: the hello was accepted."""
    BEGIN = 3
    """H: a gang starts; its rows."""
    READY = 4
    """A: the gang's session is open."""
    BATCH = 5
    """H: other rows from this step on; to a stage, also the blocks that hold them."""
    ATTEND = 6
    """H: q, then k and v of rows that append here."""
    PARTIAL = 7
    """A: out, then lse."""
    END = 8
    """H: the gang is complete."""
    LAYERS = 10
    """H, to a stage: positions of tokens, then their hidden states before the stage's layers."""
    HIDDEN = 11
    """A, of a stage: hidden states after its layers."""
    PING = 12
    """H, between gangs: some bytes, to measure how long they take."""
    PONG = 13
    """A: the same bytes."""
    FAIL = 9
    """Both: the sender's part of the gang failed; the payload has the culprit and the reason; the connection ends."""


class Header(NamedTuple):
    """Header of a frame.

    ``gang`` and ``epoch`` are zero outside gangs, ``layer`` outside ATTEND and PARTIAL; to and from stages it is the
    number of a batch. ``length`` is the payload's size in bytes, ``scale`` the factor of the scores (ATTEND).
    """

    kind: Kind
    gang: int = 0
    epoch: int = 0
    layer: int = 0
    step: int = 0
    length: int = 0
    scale: float = 0.0

    def pack(self) -> bytes:
        """Bytes of the header as they travel."""
        kind, gang, epoch, layer, step, length, scale = self
        return _LAYOUT.pack(_MAGIC, kind, layer, step, epoch, gang, length, scale)

    def __str__(self) -> str:
        text = f"{self.kind.name} of gang {self.gang}, epoch {self.epoch}, step {self.step}, layer {self.layer}"
        return f"{text}, {self.length} bytes"


_KINDS = {int(kind): kind for kind in Kind}


def parse_header(data: Buffer) -> Header | None:
    """Header at the start of ``data`` (at least :data:`HEADER_BYTES`); None if it is not one of ours."""
    magic, kind, layer, step, epoch, gang, length, scale = _LAYOUT.unpack_from(data)
    if magic != _MAGIC or kind not in _KINDS:
        return None
    return Header(_KINDS[kind], gang, epoch, layer, step, length, scale)


MESSAGE_BYTES = 4096
"""Longest reason in a failure frame."""


NOBODY = -1
"""In a failure frame: no single sequence is the reason."""

_CULPRIT = struct.Struct("<q")
FAILURE_BYTES = _CULPRIT.size + MESSAGE_BYTES
"""Longest payload of a failure frame."""


def failure_frame(gang: int, epoch: int, message: str, culprit: int = NOBODY) -> tuple[bytes, bytes]:
    """Header and payload of a failure frame, with the sequence whose plan is the reason."""
    payload = _CULPRIT.pack(culprit) + message.encode(errors="replace")[:MESSAGE_BYTES]
    return Header(Kind.FAIL, gang, epoch, length=len(payload)).pack(), payload


def failed(peer: str, payload: Buffer) -> GangAbortedError | PlanError:
    """Error for a peer that sent a failure frame; from a truncated payload, the part that arrived."""
    said = bytes(payload).ljust(_CULPRIT.size, b"\xff")
    (culprit,) = _CULPRIT.unpack_from(said)
    reason = f"{peer} failed: {said[_CULPRIT.size :].decode(errors='replace')}"
    return GangAbortedError(reason) if culprit < 0 else PlanError(reason, culprit)


def rest_of_frame(sent: int, header: Header, buffers: Sequence[Buffer]) -> list[memoryview]:
    """The rest of a frame after ``sent`` bytes were sent."""
    left = []
    for buffer in (header.pack(), *buffers):
        view = memoryview(buffer).cast("B")
        left.append(view[sent:])
        sent = max(0, sent - len(view))
    return left


def unexpected(peer: str, header: Header | None, expected: Header) -> ChannelError:
    """Error for an unexpected frame, or for bytes that are no frame."""
    if header is None:
        return ChannelError(f"{peer} sent bytes that are no frame, where {expected} was expected")
    return ChannelError(f"{peer} sent {header}; expected was {expected}")


def timed_out(peer: str, verb: str, header: Header, seconds: float) -> ChannelTimeoutError:
    """Error for a peer that did not ``verb`` (take, send) a frame in time."""
    return ChannelTimeoutError(
        f"{peer} did not {verb} {header} within {seconds:g} s; it may be frozen or cut off. "
        "If it is only slow, raise distkv.timeouts.receive"
    )


def checked(peer: str, header: Header | None, maximum: int) -> Header:
    """The header that a home sent.

    Raises
    ------
    ChannelError
        It is invalid, or announces more than ``maximum`` bytes.
    """
    if header is None:
        raise ChannelError(f"{peer} sent bytes that are no frame")
    if header.length > maximum:
        raise ChannelError(f"{peer} sent {header}; at most {maximum} bytes are expected here")
    return header
