"""The home's end of a channel over a stream socket: blocking, with time limits that the kernel keeps."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from typing import TYPE_CHECKING

from distkv_dask.errors import ChannelError, ChannelTimeoutError
from distkv_dask.worker.channels.frames import (
    FAILURE_BYTES,
    HEADER_BYTES,
    Header,
    Kind,
    failed,
    failure_frame,
    parse_header,
    rest_of_frame,
    timed_out,
    unexpected,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer


class StreamChannel:
    """Home's end over any stream socket; see :class:`distkv_dask.worker.channels.base.Channel`."""

    is_duplex = True

    def __init__(self, sock: socket.socket, peer: str, seconds: float) -> None:
        self.peer = peer
        self._sock = sock
        self._head = bytearray(HEADER_BYTES)
        self._seconds = 0.0
        self._aborted = False
        sock.settimeout(None)
        self.limit(seconds)

    def limit(self, seconds: float) -> None:
        """Set the time limit of every later call; the kernel keeps it, which saves a poll for each call."""
        if seconds == self._seconds:
            return
        self._seconds = seconds
        limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6) or int(seconds < 1))
        with contextlib.suppress(OSError):  # a broken socket says so at its next use
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def send(self, header: Header, *buffers: Buffer) -> None:
        """Send a frame."""
        try:
            self._write(header, buffers)
        except OSError as error:
            raise self.not_sent(header, error) from error

    def recv_into(self, expected: Header, buffer: memoryview | None = None) -> None:
        """Receive exactly the frame ``expected``."""
        try:
            self._finish(self._read_start(buffer), expected, buffer)
        except OSError as error:
            if isinstance(error, ChannelError):
                raise
            raise self._broken("send", expected, error) from error

    def go_on(self, head: bytes, got: int, expected: Header, buffer: memoryview, error: int) -> None:
        """:meth:`recv_into` if ``got`` bytes of the frame were read elsewhere, into ``head`` and then ``buffer``.

        ``error`` is the errno that ended this; 0 when it was something else.
        """
        self._head[:] = head
        try:
            if error:
                raise OSError(error, os.strerror(error))
            self._finish(got, expected, buffer)
        except OSError as broken:
            if isinstance(broken, ChannelError):
                raise
            raise self._broken("send", expected, broken) from broken

    def not_sent(self, header: Header, error: OSError) -> Exception:
        """The error for a frame that was not sent: the peer's reason, if it gave one."""
        return self._failure_sent() or self._broken("take", header, error)

    def fail(self, gang: int, epoch: int, message: str) -> None:
        """Try to send a failure frame without waiting, then close."""
        with contextlib.suppress(OSError):
            self._write_now(failure_frame(gang, epoch, message))
            socket.socket.shutdown(self._sock, socket.SHUT_WR)
        self.close()

    def abort(self) -> None:
        """End a call that blocks in another thread."""
        self._aborted = True
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)  # a TLS socket's own method would end its encryption

    def close(self) -> None:
        """Close; can be called again."""
        self._sock.close()

    def idle(self) -> bool:
        """Whether the channel is open and nothing unread is in it."""
        try:
            self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def fileno(self) -> int:
        """Descriptor that becomes readable when a frame comes."""
        return self._sock.fileno()

    # Overridden by encrypted sockets

    def _write(self, header: Header, buffers: tuple[Buffer, ...]) -> None:
        """Send a whole frame."""
        sent = self._sock.sendmsg((header.pack(), *buffers))
        if sent < HEADER_BYTES + header.length:
            for rest in rest_of_frame(sent, header, buffers):
                self._sock.sendall(rest)

    def _write_now(self, frame: tuple[bytes, bytes]) -> None:
        """Send as much as possible without waiting."""
        self._sock.sendmsg(frame, (), socket.MSG_DONTWAIT)

    def _read_start(self, buffer: memoryview | None) -> int:
        """Read a header and available bytes of its payload; returns the number of bytes."""
        return self._sock.recvmsg_into((self._head,) if buffer is None else (self._head, buffer))[0]

    def _read(self, view: memoryview) -> int:
        """Read into ``view`` as much as arrives in time; 0 if the peer closed."""
        return self._sock.recv_into(view, len(view), socket.MSG_WAITALL)

    def _read_now(self, count: int) -> bytes:
        """Read what has arrived, at most this many bytes."""
        return self._sock.recv(count, socket.MSG_DONTWAIT)

    # Common to plain and encrypted sockets

    def _finish(self, got: int, expected: Header, buffer: memoryview | None) -> None:
        """Read the rest of a frame that must be ``expected``; ``got`` bytes of it have been read."""
        head = self._head
        if got < HEADER_BYTES:
            self._fill(memoryview(head)[got:], got)
            got = HEADER_BYTES
        if head != expected.pack():
            raise self._unexpected(expected, b"" if buffer is None else bytes(buffer[: got - HEADER_BYTES]))
        if buffer is not None and got < HEADER_BYTES + expected.length:
            self._fill(buffer[got - HEADER_BYTES :], got)

    def _fill(self, view: memoryview, got: int) -> None:
        """Fill ``view``; ``got`` bytes of the frame have been read. A slow trickle also ends at the time limit."""
        deadline = time.monotonic() + self._seconds
        count = got
        while True:
            if not count and self._aborted:
                raise ChannelError(f"the channel to {self.peer} was aborted")
            if not count:
                raise ChannelError(f"{self.peer} closed the channel" + (f" {got} bytes into a frame" if got else ""))
            if not view:
                return
            count = self._read(view)
            view, got = view[count:], got + count
            if view and time.monotonic() > deadline:
                raise BlockingIOError

    def _unexpected(self, expected: Header, begun: bytes) -> Exception:
        """Error for a header that is not ``expected``; ``begun`` is what was read of its payload."""
        header = parse_header(self._head)
        if header is None or header.kind is not Kind.FAIL:
            return unexpected(self.peer, header, expected)
        rest = memoryview(bytearray(max(0, min(header.length, FAILURE_BYTES) - len(begun))))
        with contextlib.suppress(OSError):
            self._fill(rest, HEADER_BYTES)
        return failed(self.peer, (begun + bytes(rest))[: header.length])

    def _failure_sent(self) -> Exception | None:
        """The peer's failure frame, when it sent one before it closed."""
        try:
            self._head[:] = self._read_now(HEADER_BYTES).ljust(HEADER_BYTES)
        except OSError:
            return None
        header = parse_header(self._head)
        has_failed = header is not None and header.kind is Kind.FAIL
        return self._unexpected(Header(Kind.READY), b"") if has_failed else None

    def _broken(self, verb: str, header: Header, error: OSError) -> ChannelError:
        if self._aborted:
            return ChannelError(f"the channel to {self.peer} was aborted")
        if isinstance(error, BlockingIOError | TimeoutError):
            return timed_out(self.peer, verb, header, self._seconds)
        return ChannelError(f"the channel to {self.peer} broke ({error}), it did not {verb} {header}")


def connected(sock: socket.socket, address: tuple[str, int] | str, peer: str, seconds: float) -> socket.socket:
    """Connect a new socket to a holder's listener within ``seconds``, or close it.

    Raises
    ------
    ChannelTimeoutError, ChannelError
        It does not accept in time, or refuses.
    """
    name = repr(address) if isinstance(address, str) else "{}:{}".format(*address)
    try:
        sock.settimeout(seconds)
        sock.connect(address)
    except OSError as error:
        sock.close()
        if isinstance(error, TimeoutError):
            raise ChannelTimeoutError(f"{peer} ({name}) does not accept a channel in {seconds:g} s") from error
        raise ChannelError(f"cannot open a channel to {peer} ({name}): {error}") from error
    return sock
