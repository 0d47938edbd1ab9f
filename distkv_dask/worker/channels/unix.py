"""Channels over Unix sockets, between two workers of one user on one machine: 0.6 to 0.9 of TCP's round trip.

Sockets are abstract ones: they have no file that would have to be removed, and they belong to a network namespace, so
containers that share one reach each other. The kernel tells each end the other's user: only the same one is served.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
from pathlib import Path
from typing import Any, Self

from distkv_dask.errors import ChannelError
from distkv_dask.worker.channels.stream import StreamChannel, connected
from distkv_dask.worker.channels.stream_inlet import StreamInlet, StreamListener

_CREDENTIALS = struct.Struct("iII")


def machine() -> str:
    """Name of this running kernel and network namespace: Unix sockets connect processes within it; "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return ""


def is_near(name: str) -> bool:
    """Whether a listener of that name (:attr:`UnixListener.name`) is on this machine."""
    here = machine()
    return bool(here) and name.startswith(f"distkv-{here}-")


class UnixChannel(StreamChannel):
    """Home's end over a Unix socket; see :class:`distkv_dask.worker.channels.base.Channel`."""

    @classmethod
    def open(cls, name: str, peer: str, seconds: float) -> Self:
        """Connect to the holder's listener of that name.

        Raises
        ------
        ChannelTimeoutError, ChannelError
            It does not answer within ``seconds``, refuses, or belongs to another user.
        """
        sock = connected(socket.socket(socket.AF_UNIX), f"\0{name}", peer, seconds)
        _, user = _peer(sock)
        if user != os.geteuid():
            sock.close()
            raise ChannelError(
                f"the Unix socket of {peer} belongs to user {user}, this worker to {os.geteuid()}: run all workers as "
                "one user, or set distkv.channel to tcp"
            )
        return cls(sock, peer, seconds)


class UnixListener(StreamListener):
    """Listening Unix socket; see :class:`distkv_dask.worker.channels.base.Listener`.

    Parameters
    ----------
    maximum
        Longest payload, in bytes, that a connection may send at first.
    """

    def __init__(self, maximum: int) -> None:
        self.name = f"distkv-{machine()}-{secrets.token_hex(8)}"
        """Where :meth:`UnixChannel.open` connects."""
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(f"\0{self.name}")
        sock.listen(256)
        super().__init__(sock, maximum)

    def _inlet(self, sock: socket.socket, address: Any) -> StreamInlet:
        process, user = _peer(sock)
        if user != os.geteuid():
            raise ChannelError(f"it is process {process} of user {user}, not of this worker's user")
        return StreamInlet(sock, f"process {process} of this machine", self._maximum)


def _peer(sock: socket.socket) -> tuple[int, int]:
    """Process and user at the other end."""
    process, user, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return process, user
