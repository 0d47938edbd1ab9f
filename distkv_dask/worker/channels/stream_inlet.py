"""The holder's end of channels over stream sockets: partial frames are buffered, nothing ever blocks."""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from distkv_dask.errors import ChannelError
from distkv_dask.worker.channels.frames import (
    HEADER_BYTES,
    NOBODY,
    Header,
    checked,
    failure_frame,
    parse_header,
    rest_of_frame,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer


_USED_UP = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class StreamInlet:
    """Holder's end over any stream socket; see :class:`distkv_dask.worker.channels.base.Inlet`."""

    def __init__(self, sock: socket.socket, peer: str, maximum: int) -> None:
        self.peer = peer
        self.maximum = maximum
        self._sock = sock
        self._filled = 0
        self._header: Header | None = None
        self._unsent = memoryview(b"")
        sock.setblocking(False)
        self.data = torch.empty(0, dtype=torch.uint8)
        self._view = memoryview(b"")
        self.make_room(maximum)

    @property
    def sending(self) -> bool:
        """Whether a frame is not yet completely handed to the kernel."""
        return bool(self._unsent)

    @property
    def filled(self) -> int:
        """Bytes of the current frame that were read."""
        return self._filled

    def go_on(self, filled: int, sent: int, *unsent: Buffer) -> None:
        """Continue after C++ has read up to ``filled`` bytes and sent ``sent`` bytes of the frame ``unsent``."""
        self._filled, self._header = filled, None
        if unsent:
            self._unsent = memoryview(b"".join(unsent))[sent:]

    @property
    def events(self) -> int:
        """What :mod:`selectors` should wait for."""
        return selectors.EVENT_WRITE if self._unsent else selectors.EVENT_READ

    def make_room(self, payload: int) -> None:
        """Make ``data`` large enough for payloads of that many bytes."""
        if len(self._view) < HEADER_BYTES + payload:
            data = torch.empty(HEADER_BYTES + payload, dtype=torch.uint8)
            view = data.numpy().data
            view[: self._filled] = self._view[: self._filled]
            self.data, self._view = data, view

    def receive(self) -> Header | None:
        """Read available bytes; returns the header of a complete frame."""
        while True:
            header = self._header
            if header is None and self._filled >= HEADER_BYTES:
                self._header = header = checked(self.peer, parse_header(self._view), self.maximum)
                self.make_room(header.length)
            if header is not None and self._filled >= HEADER_BYTES + header.length:
                return header
            try:
                count = self._read(self._view[self._filled :])
            except BlockingIOError:
                return None
            except OSError as error:
                raise ChannelError(f"the channel from {self.peer} broke ({error})") from error
            if not count:
                raise ChannelError(f"{self.peer} closed the channel")
            self._filled += count

    def payload(self, header: Header) -> memoryview:
        """Payload of the current frame."""
        return self._view[HEADER_BYTES : HEADER_BYTES + header.length]

    def consume(self, header: Header) -> bool:
        """Drop the current frame; True if bytes of the next one have arrived already."""
        end, filled = HEADER_BYTES + header.length, self._filled
        self._header = None
        self._filled = filled - end
        if filled == end:
            return False
        self._view[: filled - end] = bytes(self._view[end:filled])
        return True

    def send(self, header: Header, *buffers: Buffer) -> None:
        """Send as much of a frame as possible."""
        try:
            sent = 0 if self._unsent else self._write((header.pack(), *buffers))
        except BlockingIOError:
            sent = 0
        except ConnectionError:  # why it ended is the last thing that can be read
            return
        except OSError as error:
            raise ChannelError(f"the channel from {self.peer} broke ({error})") from error
        if sent < HEADER_BYTES + header.length:
            self._unsent = memoryview(b"".join((self._unsent, *rest_of_frame(sent, header, buffers))))

    def flush(self) -> None:
        """Send more of what :meth:`send` could not."""
        try:
            self._unsent = self._unsent[self._write((self._unsent,)) :]
        except BlockingIOError:
            return
        except ConnectionError:  # as in send
            self._unsent = memoryview(b"")
        except OSError as error:
            raise ChannelError(f"the channel from {self.peer} broke ({error})") from error

    def fail(self, gang: int, epoch: int, message: str, culprit: int = NOBODY) -> None:
        """Try to send a failure frame without waiting, then close."""
        with contextlib.suppress(OSError):
            if not self._unsent:
                self._write(failure_frame(gang, epoch, message, culprit))
            socket.socket.shutdown(self._sock, socket.SHUT_WR)
        self.close()

    def close(self) -> None:
        """Close; can be called again."""
        self._sock.close()

    def fileno(self) -> int:
        """Descriptor for :mod:`selectors`."""
        return self._sock.fileno()

    # Overridden by encrypted sockets

    def _read(self, view: memoryview) -> int:
        """Read available bytes; 0 if the peer closed, BlockingIOError if there are none."""
        return self._sock.recv_into(view)

    def _write(self, buffers: Iterable[Buffer]) -> int:
        """Send as much as the kernel accepts; returns the number of bytes."""
        return self._sock.sendmsg(buffers)


class StreamListener:
    """Listening socket; see :class:`distkv_dask.worker.channels.base.Listener`.

    It keeps a spare file descriptor. If the process has no other left, it accepts a connection with it and closes it; a
    pending connection would wake the lane forever.
    """

    def __init__(self, sock: socket.socket, maximum: int) -> None:
        self._sock = sock
        self._maximum = maximum
        self._spare = _spare()
        sock.setblocking(False)

    def accept(self) -> StreamInlet | None:
        """Next connection, or None; the peer has no name but its address until it says hello."""
        try:
            sock, address = self._sock.accept()
        except OSError as error:
            if error.errno not in _USED_UP:
                return None
            self._turn_away()
            raise ChannelError(f"this process cannot open more connections ({error}): raise ulimit -n") from error
        try:
            return self._inlet(sock, address)
        except BaseException:
            sock.close()
            raise

    def fileno(self) -> int:
        """Descriptor that becomes readable when a peer connects."""
        return self._sock.fileno()

    def close(self) -> None:
        """Stop listening. Can be called again."""
        self._sock.close()
        self._spare.close()

    def _turn_away(self) -> None:
        """Accept a connection and close it; raises OSError if another thread has taken the spare descriptor."""
        self._spare.close()
        try:
            self._sock.accept()[0].close()
        finally:
            self._spare = _spare()

    def _inlet(self, sock: socket.socket, address: Any) -> StreamInlet:
        """The holder's end of a connection; ChannelError refuses it."""
        raise NotImplementedError


def _spare() -> BinaryIO:
    """A file that can be closed to free its descriptor."""
    return open(os.devnull, "rb", buffering=0)
