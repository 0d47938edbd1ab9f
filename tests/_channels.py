"""Kinds of channels for tests that run over all of them, and peers with bare sockets that can send anything."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from distributed.security import Security

from distkv_dask.types import Endpoint
from distkv_dask.worker.channels.base import Channel, Listener
from distkv_dask.worker.channels.dial import Dialer
from distkv_dask.worker.channels.tcp import TcpListener
from distkv_dask.worker.channels.tls import Certificates, TlsListener
from distkv_dask.worker.channels.unix import UnixListener


@cache
def certificates() -> Certificates:
    made = Certificates.of(Security.temporary())
    assert made is not None
    return made


@dataclass(frozen=True)
class Way:
    """A kind of channel: what ``distkv.channel`` says, whether with certificates, whether C++ may serve it."""

    name: str
    channel: str
    encrypted: bool = False
    native: bool = True

    @property
    def certificates(self) -> Certificates | None:
        return certificates() if self.encrypted else None

    def open(self, endpoint: Endpoint, seconds: float = 10.0) -> Channel:
        return Dialer(self.channel, self.certificates).connect(endpoint, seconds)

    def listen(self, maximum: int) -> tuple[Listener, Endpoint]:
        if self.channel == "unix":
            near = UnixListener(maximum)
            return near, Endpoint("w1", "127.0.0.1", 9, near.name)
        far = TlsListener("127.0.0.1", 0, maximum, certificates().holder) if self.encrypted else None
        far = far or TcpListener("127.0.0.1", 0, maximum)
        return far, Endpoint("w1", "127.0.0.1", far.port)


TCP = Way("tcp", "tcp")
WAYS = (
    TCP,
    Way("unix", "unix"),
    Way("tls", "tcp", encrypted=True),
    Way("tcp-in-python", "tcp", native=False),
)


class Bare:
    """A holder's address behind which tests accept by hand."""

    def __init__(self, way: Way) -> None:
        listener, self.endpoint = way.listen(0)
        self._socket: socket.socket = listener._sock  # type: ignore[attr-defined]
        self._socket.setblocking(True)
        self._way = way

    def accept(self) -> socket.socket:
        peer, _ = self._socket.accept()
        if self._way.encrypted:
            return certificates().holder.wrap_socket(peer, server_side=True, do_handshake_on_connect=False)
        return peer

    def close(self) -> None:
        self._socket.close()


@contextmanager
def stranger(listener: Listener, seconds: float = 5.0) -> Iterator[socket.socket]:
    """A bare connection of somebody who is no home."""
    its: socket.socket = listener._sock  # type: ignore[attr-defined]
    with socket.socket(its.family) as mine:
        mine.settimeout(seconds)
        mine.connect(its.getsockname())
        yield mine
