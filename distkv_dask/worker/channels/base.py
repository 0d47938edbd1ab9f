"""The channel contract: frames with exact lengths between a home and a holder, and the two ends that carry them.

The home's end (:class:`Channel`) blocks, with a time limit; the holder's end (:class:`Inlet`) never does, because one
thread serves all homes. A frame is a 64-byte header and a payload; every header names gang, epoch, layer and step, so
that a leftover of a failed window is never taken for an answer.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

if TYPE_CHECKING:
    from typing_extensions import Buffer

_LAYOUT = struct.Struct("<4sBxHIIQQd24x")
_MAGIC = b"DKV1"
HEADER_BYTES = _LAYOUT.size
"""Size of a frame's header; payload tensors start on this boundary."""


class Kind(IntEnum):
    """What a frame means. H is sent by the home, A by the holder (which answers)."""

    HELLO = 1
    """H: token, engine and geometry; the first frame of a connection."""
    WELCOME = 2
    """A: the hello was accepted."""
    BEGIN = 3
    """H: a gang starts; its rows."""
    READY = 4
    """A: the gang's session is open."""
    BATCH = 5
    """H: other rows from this step on."""
    ATTEND = 6
    """H: q, then k and v of rows that append here."""
    PARTIAL = 7
    """A: out, then lse."""
    END = 8
    """H: the gang is complete."""
    FAIL = 9
    """Both: the sender's part of the gang failed, payload is the reason; the connection ends."""


class Header(NamedTuple):
    """Header of a frame.

    ``gang`` and ``epoch`` are zero outside gangs, ``layer`` outside ATTEND and PARTIAL. ``length`` is the payload's
    size in bytes, ``scale`` the factor of the scores (ATTEND).
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
    """Header at the start of ``data`` (at least :data:`HEADER_BYTES`); None when it is none of ours."""
    magic, kind, layer, step, epoch, gang, length, scale = _LAYOUT.unpack_from(data)
    if magic != _MAGIC or kind not in _KINDS:
        return None
    return Header(_KINDS[kind], gang, epoch, layer, step, length, scale)


class Channel(Protocol):
    """The home's end: blocks, each call at most for the time limit. Used by one thread, except :meth:`abort`."""

    peer: str

    def limit(self, seconds: float) -> None:
        """Set the time limit of every later call."""

    def send(self, header: Header, *buffers: Buffer) -> None:
        """Send a frame, gathered from ``header`` and contiguous ``buffers`` of ``header.length`` bytes together.

        Raises
        ------
        GangAbortedError
            The peer had sent a failure frame.
        ChannelTimeoutError, ChannelError
            The peer does not take it in time; the channel broke.
        """

    def recv_into(self, expected: Header, buffer: memoryview | None = None) -> None:
        """Receive exactly the frame ``expected``; its payload fills ``buffer`` (bytes, ``expected.length`` long).

        Raises
        ------
        GangAbortedError
            The peer sent a failure frame.
        ChannelTimeoutError
            Nothing came in time.
        ChannelError
            The peer closed, or sent another frame: the message has both sides' view.
        """

    def fail(self, gang: int, epoch: int, message: str) -> None:
        """Send a failure frame as far as possible without waiting, then close. Never raises."""

    def abort(self) -> None:
        """End a call that blocks in another thread: it raises ChannelError. The channel is unusable then."""

    def close(self) -> None:
        """Close; can be called again."""

    def idle(self) -> bool:
        """Whether the channel is open and nothing unread is in it, so that a next gang can use it."""

    def fileno(self) -> int:
        """Descriptor that becomes readable when a frame comes."""


class Inlet(Protocol):
    """The holder's end: never blocks. The frame being read lies at the start of ``data``."""

    peer: str
    maximum: int
    """Longest payload accepted, in bytes; a longer one is refused when its header is read."""
    data: torch.Tensor
    """uint8 [at least HEADER_BYTES + payload]: header and payload of the current frame."""

    @property
    def sending(self) -> bool:
        """Whether a frame is not yet completely handed to the transport."""

    def make_room(self, payload: int) -> None:
        """Make ``data`` large enough for payloads of that many bytes; it may become another tensor."""

    def receive(self) -> Header | None:
        """Read what is there; the header once a whole frame is, else None. The frame stays until :meth:`consume`.

        Raises
        ------
        ChannelError
            The peer closed, or sent what is no frame, or one that is longer than ``maximum``.
        """

    def payload(self, header: Header) -> memoryview:
        """Payload of the current frame, valid until :meth:`consume`."""

    def consume(self, header: Header) -> bool:
        """Drop the current frame; True when bytes of a next one are there already."""

    def send(self, header: Header, *buffers: Buffer) -> None:
        """Send a frame as far as possible; the rest is copied and leaves with :meth:`flush`.

        Raises
        ------
        ChannelError
            The channel broke.
        """

    def flush(self) -> None:
        """Send more of what :meth:`send` could not."""

    def fail(self, gang: int, epoch: int, message: str) -> None:
        """Send a failure frame as far as possible without waiting, then close. Never raises."""

    def close(self) -> None:
        """Close; can be called again."""

    def fileno(self) -> int:
        """Descriptor for :mod:`selectors`."""


class Listener(Protocol):
    """Where homes connect."""

    port: int

    def accept(self) -> Inlet | None:
        """Next connection, or None when there is none just now."""

    def fileno(self) -> int:
        """Descriptor that becomes readable when somebody connects."""

    def close(self) -> None:
        """Stop listening."""
