"""Channels over TCP, without delay for small frames."""

from __future__ import annotations

import socket
from typing import Any, Self

from distkv_dask.worker.channels.stream import StreamChannel, connected
from distkv_dask.worker.channels.stream_inlet import StreamInlet, StreamListener


class TcpChannel(StreamChannel):
    """Home's end over TCP; see :class:`distkv_dask.worker.channels.base.Channel`."""

    @classmethod
    def open(cls, host: str, port: int, peer: str, seconds: float) -> Self:
        """Connect to a holder's listener.

        Raises
        ------
        ChannelTimeoutError, ChannelError
            It does not answer within ``seconds``, or refuses.
        """
        return cls(tcp_socket(host, port, peer, seconds), peer, seconds)


class TcpListener(StreamListener):
    """Listening TCP socket; see :class:`distkv_dask.worker.channels.base.Listener`.

    Parameters
    ----------
    host, port
        Address to listen on; port 0 takes a free one.
    maximum
        Longest payload, in bytes, that a connection may send at first.
    """

    def __init__(self, host: str, port: int, maximum: int) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__(socket.create_server((host, port), family=family, backlog=256), maximum)
        self.port: int = self._sock.getsockname()[1]

    def _inlet(self, sock: socket.socket, address: Any) -> StreamInlet:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._end(sock, f"{address[0]}:{address[1]}")

    def _end(self, sock: socket.socket, peer: str) -> StreamInlet:
        return StreamInlet(sock, peer, self._maximum)


def tcp_socket(host: str, port: int, peer: str, seconds: float) -> socket.socket:
    """Socket connected to a holder's listener; raises as :meth:`TcpChannel.open` does."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = connected(socket.socket(family), (host, port), peer, seconds)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock
