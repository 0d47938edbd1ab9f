"""Channels over TCP with TLS: on a cluster with certificates, both ends are authenticated and all is encrypted."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from distkv_dask.worker.channels.frames import HEADER_BYTES, Header
from distkv_dask.worker.channels.stream import StreamChannel
from distkv_dask.worker.channels.stream_inlet import StreamInlet
from distkv_dask.worker.channels.tcp import TcpListener, tcp_socket

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable

    from distributed.security import Security
    from typing_extensions import Buffer


@dataclass(frozen=True, slots=True)
class Certificates:
    """A worker's certificates, ready for its two roles: ``holder`` accepts channels, ``home`` opens them."""

    holder: ssl.SSLContext
    home: ssl.SSLContext

    @classmethod
    def of(cls, security: Security) -> Certificates | None:
        """The certificates that Dask's own comms between workers use; None on a cluster without."""
        holder = security.get_listen_args("worker").get("ssl_context")
        home = security.get_connection_args("worker").get("ssl_context")
        if holder is None or home is None:
            return None
        holder.num_tickets = 0  # sessions are not resumed, and a ticket would make an idle channel look readable
        return cls(holder, home)


class TlsChannel(StreamChannel):
    """Home's end over TLS; see :class:`distkv_dask.worker.channels.base.Channel`.

    The first frame begins with the handshake, so that :meth:`abort` ends that too.
    """

    is_duplex = False
    _sock: ssl.SSLSocket

    @classmethod
    def open(cls, host: str, port: int, peer: str, seconds: float, context: ssl.SSLContext) -> Self:
        """Connect to a holder's listener; certificates are checked with the first frame.

        Raises
        ------
        ChannelTimeoutError, ChannelError
            It does not answer within ``seconds``, or refuses.
        """
        sock = tcp_socket(host, port, peer, seconds)
        return cls(context.wrap_socket(sock, do_handshake_on_connect=False), peer, seconds)

    def limit(self, seconds: float) -> None:
        """Set the time limit of every later call; Python keeps it, since one call may read several times."""
        self._seconds = seconds
        self._sock.settimeout(seconds)

    def idle(self) -> bool:
        """Whether the channel is open and nothing unread is in it."""
        try:
            self._read_now(1)
        except ssl.SSLWantReadError:
            return True
        except OSError:
            pass
        finally:
            self._sock.settimeout(self._seconds)
        return False

    def _write(self, header: Header, buffers: tuple[Buffer, ...]) -> None:
        self._sock.sendall(b"".join((header.pack(), *buffers)))

    def _write_now(self, frame: tuple[bytes, bytes]) -> None:
        self._sock.settimeout(0)
        self._sock.send(b"".join(frame))

    def _read_start(self, buffer: memoryview | None) -> int:
        return self._sock.recv_into(self._head, HEADER_BYTES)

    def _read(self, view: memoryview) -> int:
        return self._sock.recv_into(view)

    def _read_now(self, count: int) -> bytes:
        self._sock.settimeout(0)
        return self._sock.recv(count)


class TlsInlet(StreamInlet):
    """Holder's end over TLS; see :class:`distkv_dask.worker.channels.base.Inlet`. Its first reads are the handshake.

    TLS starts with the first read: it would fail for a peer that has hung up already, and accepting must not fail for
    that.
    """

    _sock: ssl.SSLSocket
    _context: ssl.SSLContext | None

    def __init__(self, sock: socket.socket, peer: str, maximum: int, context: ssl.SSLContext) -> None:
        super().__init__(sock, peer, maximum)
        self._context = context

    def consume(self, header: Header) -> bool:
        """Drop the current frame; True if bytes of the next one have arrived, here or in the decrypted data."""
        return super().consume(header) or self._sock.pending() > 0

    def _read(self, view: memoryview) -> int:
        if self._context is not None:
            self._sock.getpeername()  # OSError: wrap_socket would leave a socket behind whose peer is gone
            self._sock = self._context.wrap_socket(self._sock, server_side=True, do_handshake_on_connect=False)
            self._context = None
        try:
            return self._sock.recv_into(view)
        except ssl.SSLWantReadError as error:
            raise BlockingIOError from error

    def _write(self, buffers: Iterable[Buffer]) -> int:
        data = memoryview(b"".join(buffers))
        sent = 0
        try:
            while sent < len(data):
                sent += self._sock.send(data[sent:])
        except ssl.SSLWantWriteError:
            pass
        return sent


class TlsListener(TcpListener):
    """Listening socket for TLS; see :class:`distkv_dask.worker.channels.base.Listener`.

    Parameters
    ----------
    host, port
        Address to listen on; port 0 takes a free one.
    maximum
        Longest payload, in bytes, that a connection may send at first.
    context
        The holder's certificates (:attr:`Certificates.holder`).
    """

    def __init__(self, host: str, port: int, maximum: int, context: ssl.SSLContext) -> None:
        super().__init__(host, port, maximum)
        self._context = context

    def _end(self, sock: socket.socket, peer: str) -> StreamInlet:
        return TlsInlet(sock, peer, self._maximum, self._context)
