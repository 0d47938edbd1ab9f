"""A network between a home and a real holder that can be cut, fall silent, or garble the holder's answers."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable

from _channels import Bare, Way

from distkv_dask.placement import Endpoint

Trouble = Callable[["Wire", bytes], bytes]


def _reset(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()


class Wire:
    """One connection through the proxy."""

    def __init__(self, home: socket.socket, holder: socket.socket) -> None:
        self.home = home
        self.holder = holder
        self.open = True

    def cut(self, end: Callable[[socket.socket], None] = socket.socket.close) -> None:
        self.open = False
        end(self.home)
        end(self.holder)


def silence(wire: Wire, answer: bytes) -> bytes:
    """Packets are dropped in both directions, and neither side learns of it."""
    return b""


def close(wire: Wire, answer: bytes) -> bytes:
    wire.cut()
    return b""


def kill(wire: Wire, answer: bytes) -> bytes:
    wire.cut(_reset)
    return b""


def garble(wire: Wire, answer: bytes) -> bytes:
    return b"\xff" * 5000


def truncate(wire: Wire, answer: bytes) -> bytes:
    wire.home.sendall(answer[:100])
    wire.cut()
    return b""


def slow(seconds: float) -> Trouble:
    """Delays all answers of the holder by this time."""

    def wait(wire: Wire, answer: bytes) -> bytes:
        time.sleep(seconds)
        return answer

    return wait


class Proxy:
    """Forwards between homes and a holder; ``trouble``, once set, decides what happens to the holder's answers."""

    def __init__(self, way: Way, holder: Endpoint) -> None:
        self._bare = Bare(way)
        unix = way.channel == "unix"
        self._family = socket.AF_UNIX if unix else socket.AF_INET
        self._target = f"\0{holder.unix}" if unix else (holder.host, holder.port)
        here = self._bare.endpoint
        self.endpoint = Endpoint(holder.worker, here.host, here.port, here.unix)
        self.trouble: Trouble | None = None
        self.opened = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._bare._socket, selectors.EVENT_READ)
        wires: list[Wire] = []
        while not self._stop.is_set():
            for key, _ in selector.select(0.05):
                if key.data is None:
                    wires.append(self._accept(selector))
                else:
                    self._forward(selector, key.fileobj, *key.data)  # type: ignore[arg-type]
        for wire in wires:
            wire.cut()
        selector.close()

    def _accept(self, selector: selectors.BaseSelector) -> Wire:
        home, _ = self._bare._socket.accept()
        holder = socket.socket(self._family)
        holder.connect(self._target)
        self.opened += 1
        wire = Wire(home, holder)
        selector.register(home, selectors.EVENT_READ, (wire, holder, False))
        selector.register(holder, selectors.EVENT_READ, (wire, home, True))
        return wire

    def _forward(
        self, selector: selectors.BaseSelector, source: socket.socket, wire: Wire, target: socket.socket, answers: bool
    ) -> None:
        try:
            data = source.recv(1 << 20)
        except OSError:
            data = b""
        if not data and self.trouble is silence:  # the other side must not learn of it
            selector.unregister(source)
            return
        if data and self.trouble is not None:
            data = self.trouble(wire, data) if answers else b"" if self.trouble is silence else data
            if not data and wire.open:
                return
        with contextlib.suppress(OSError):
            if data and wire.open:
                target.sendall(data)
                return
        for end in (wire.home, wire.holder):
            with contextlib.suppress(KeyError, ValueError):
                selector.unregister(end)
        self._forget(selector)
        wire.cut()

    @staticmethod
    def _forget(selector: selectors.BaseSelector) -> None:
        """Drop ends that were closed by the trouble itself."""
        for key in list(selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket) and key.fileobj.fileno() < 0:
                selector.unregister(key.fileobj)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._bare.close()
