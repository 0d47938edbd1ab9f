"""Kinds of channels for tests that run over all of them, and peers that can send anything."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
from distributed.security import Security

from distkv_dask.placement import Endpoint
from distkv_dask.worker.channels.base import Channel, Listener
from distkv_dask.worker.channels.dial import Dialer
from distkv_dask.worker.channels.frames import HEADER_BYTES
from distkv_dask.worker.channels.optional_ucx import ucx_listener
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
    """A kind of channel: the value of ``distkv.channel``, whether it has certificates, and whether C++ may serve it."""

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
        if self.channel == "ucx":
            ucx = ucx_listener(maximum)
            return ucx, Endpoint("w1", "127.0.0.1", 9, ucx=ucx.port)
        far = TlsListener("127.0.0.1", 0, maximum, certificates().holder) if self.encrypted else None
        far = far or TcpListener("127.0.0.1", 0, maximum)
        return far, Endpoint("w1", "127.0.0.1", far.port)


TCP, UNIX, TLS = Way("tcp", "tcp"), Way("unix", "unix"), Way("tls", "tcp", encrypted=True)
UCX = Way("ucx", "ucx")
WAYS = (TCP, UNIX, TLS, UCX, Way("tcp-in-python", "tcp", native=False))


def skip_without(way: Way) -> None:
    if way is UCX and find_spec("ucxx") is None:
        pytest.skip("ucxx is not installed")


class Bare:
    """A holder's address at which tests accept connections themselves: sockets, or objects that behave like them."""

    def __init__(self, way: Way) -> None:
        self._listener, self.endpoint = way.listen(1 << 20)
        self._way = way
        if way is not UCX:
            self._socket: socket.socket = self._listener._sock  # type: ignore[attr-defined]
            self._socket.setblocking(True)

    def accept(self) -> Any:
        if self._way is UCX:
            from _ucx_peers import accepted

            return accepted(self._listener)
        peer, _ = self._socket.accept()
        if self._way.encrypted:
            return certificates().holder.wrap_socket(peer, server_side=True, do_handshake_on_connect=False)
        return peer

    def close(self) -> None:
        """Accept no more connections."""
        if self._way is UCX:
            from _ucx_peers import close_when_unused

            close_when_unused(self._listener)
        else:
            self._socket.close()


@contextmanager
def stranger(listener: Listener, seconds: float = 5.0) -> Iterator[Any]:
    """A bare connection from a peer that is not a home."""
    if not hasattr(listener, "_sock"):
        from _ucx_peers import connected

        with connected(listener.port) as mine:  # type: ignore[attr-defined]
            yield mine
        return
    its: socket.socket = listener._sock
    with socket.socket(its.family) as mine:
        mine.settimeout(seconds)
        mine.connect(its.getsockname())
        yield mine


def send_bare(home: Channel, frame: bytes) -> None:
    """Send the first part of a frame and no more (over UCX only the header, because messages are never cut)."""
    if hasattr(home, "_sock"):
        home._sock.send(frame)
    else:
        from _ucx_peers import send_bytes

        send_bytes(home._line, frame[:HEADER_BYTES])  # type: ignore[attr-defined]
