"""The holder's end of TCP channels: partial frames are buffered, nothing ever blocks."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

import torch

from distkv_dask.errors import ChannelError
from distkv_dask.worker.channels.frames import HEADER_BYTES, Header, failure_frame, parse_header, rest_of_frame

if TYPE_CHECKING:
    from typing_extensions import Buffer


class TcpInlet:
    """Holder's end over TCP; see :class:`distkv_dask.worker.channels.base.Inlet`."""

    def __init__(self, sock: socket.socket, peer: str, maximum: int) -> None:
        self.peer = peer
        self.maximum = maximum
        self._sock = sock
        self._filled = 0
        self._header: Header | None = None
        self._unsent = memoryview(b"")
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.data = torch.empty(0, dtype=torch.uint8)
        self._view = memoryview(b"")
        self.make_room(maximum)

    @property
    def sending(self) -> bool:
        """Whether a frame is not yet completely handed to the kernel."""
        return bool(self._unsent)

    def make_room(self, payload: int) -> None:
        """Make ``data`` large enough for payloads of that many bytes."""
        if len(self._view) < HEADER_BYTES + payload:
            data = torch.empty(HEADER_BYTES + payload, dtype=torch.uint8)
            view = data.numpy().data
            view[: self._filled] = self._view[: self._filled]
            self.data, self._view = data, view

    def receive(self) -> Header | None:
        """Read what is there; the header once a whole frame is."""
        while True:
            header = self._header
            if header is None and self._filled >= HEADER_BYTES:
                self._header = header = self._check(parse_header(self._view))
            if header is not None and self._filled >= HEADER_BYTES + header.length:
                return header
            try:
                count = self._sock.recv_into(self._view[self._filled :])
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
        """Drop the current frame; True when bytes of a next one are there already."""
        end, filled = HEADER_BYTES + header.length, self._filled
        self._header = None
        self._filled = filled - end
        if filled == end:
            return False
        self._view[: filled - end] = bytes(self._view[end:filled])
        return True

    def send(self, header: Header, *buffers: Buffer) -> None:
        """Send a frame as far as possible."""
        try:
            sent = 0 if self._unsent else self._sock.sendmsg((header.pack(), *buffers))
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise ChannelError(f"the channel from {self.peer} broke ({error})") from error
        if sent < HEADER_BYTES + header.length:
            self._unsent = memoryview(b"".join((self._unsent, *rest_of_frame(sent, header, buffers))))

    def flush(self) -> None:
        """Send more of what :meth:`send` could not."""
        try:
            self._unsent = self._unsent[self._sock.send(self._unsent) :]
        except BlockingIOError:
            return
        except OSError as error:
            raise ChannelError(f"the channel from {self.peer} broke ({error})") from error

    def fail(self, gang: int, epoch: int, message: str) -> None:
        """Send a failure frame as far as possible without waiting, then close."""
        with contextlib.suppress(OSError):
            if not self._unsent:
                self._sock.sendmsg(failure_frame(gang, epoch, message))
            self._sock.shutdown(socket.SHUT_WR)
        self.close()

    def close(self) -> None:
        """Close; can be called again."""
        self._sock.close()

    def fileno(self) -> int:
        """Descriptor for :mod:`selectors`."""
        return self._sock.fileno()

    def _check(self, header: Header | None) -> Header:
        if header is None:
            raise ChannelError(f"{self.peer} sent bytes that are no frame")
        if header.length > self.maximum:
            raise ChannelError(f"{self.peer} sent {header}; at most {self.maximum} bytes are expected here")
        self.make_room(header.length)
        return header


class TcpListener:
    """Listening socket; see :class:`distkv_dask.worker.channels.base.Listener`."""

    def __init__(self, host: str, port: int, maximum: int) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._sock = socket.create_server((host, port), family=family, backlog=256)
        self._sock.setblocking(False)
        self._maximum = maximum
        self.port: int = self._sock.getsockname()[1]

    def accept(self) -> TcpInlet | None:
        """Next connection, or None; the peer has no name but its address until it says hello."""
        try:
            sock, address = self._sock.accept()
        except OSError:
            return None
        return TcpInlet(sock, f"{address[0]}:{address[1]}", self._maximum)

    def fileno(self) -> int:
        """Descriptor that becomes readable when somebody connects."""
        return self._sock.fileno()

    def close(self) -> None:
        """Stop listening."""
        self._sock.close()
