"""The channel contract: two ends that carry frames between a home and a holder.

The home's end (:class:`Channel`) blocks, with a time limit; the holder's end (:class:`Inlet`) never does, because one
thread serves all homes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from distkv_dask.worker.channels.frames import NOBODY, Header

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Channel(Protocol):
    """The home's end: blocks, each call at most for the time limit. Used by one thread, except :meth:`abort`."""

    peer: str
    is_duplex: bool
    """Whether one thread may send while another one receives."""

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
            No frame came in time.
        ChannelError
            The peer closed, or sent another frame: the message has both sides' view.
        """

    def fail(self, gang: int, epoch: int, message: str) -> None:
        """Try to send a failure frame without waiting for long, then close. Never raises."""

    def abort(self) -> None:
        """End a call that blocks in another thread: it raises ChannelError. The channel is unusable then."""

    def close(self) -> None:
        """Close; can be called again."""

    def idle(self) -> bool:
        """Whether the channel is open and nothing unread is in it, so that another gang can use it."""

    def fileno(self) -> int:
        """Descriptor that becomes readable when a frame comes."""


class Inlet(Protocol):
    """The holder's end: never blocks. The frame being read is at the start of ``data``."""

    peer: str
    maximum: int
    """Longest payload accepted, in bytes; a longer one is refused when its header is read."""
    data: torch.Tensor
    """uint8 [at least HEADER_BYTES + payload]: header and payload of the current frame."""

    @property
    def sending(self) -> bool:
        """Whether a frame is not yet completely handed to the transport."""

    @property
    def events(self) -> int:
        """What :mod:`selectors` should wait for on :meth:`fileno`; it changes with :attr:`sending`."""

    def make_room(self, payload: int) -> None:
        """Make ``data`` large enough for payloads of that many bytes; it may become another tensor."""

    def receive(self) -> Header | None:
        """Read available bytes; returns the header of a complete frame, which stays until :meth:`consume`, else None.

        Raises
        ------
        ChannelError
            The peer closed, or sent bytes that are not a frame, or a frame longer than ``maximum``.
        """

    def payload(self, header: Header) -> memoryview:
        """Payload of the current frame, valid until :meth:`consume`."""

    def consume(self, header: Header) -> bool:
        """Drop the current frame; True if bytes of the next one have arrived already."""

    def send(self, header: Header, *buffers: Buffer) -> None:
        """Send as much of a frame as possible; the rest leaves with :meth:`flush`.

        The buffers must not change while :attr:`sending`: not every transport copies bytes that it cannot send at once.

        Raises
        ------
        ChannelError
            The channel broke.
        """

    def flush(self) -> None:
        """Send more of what :meth:`send` could not."""

    def fail(self, gang: int, epoch: int, message: str, culprit: int = NOBODY) -> None:
        """Try to send a failure frame without waiting, then close. Never raises.

        ``culprit`` is the sequence whose plan is the reason, if there is one.
        """

    def close(self) -> None:
        """Close; can be called again."""

    def fileno(self) -> int:
        """Descriptor for :mod:`selectors`."""


class Listener(Protocol):
    """Where homes connect."""

    def accept(self) -> Inlet | None:
        """Next connection, or None if there is none now.

        Raises
        ------
        ChannelError
            One connection was refused; there may be more.
        """

    def fileno(self) -> int:
        """Descriptor that becomes readable when a peer connects."""

    def close(self) -> None:
        """Stop listening."""
