"""Peers over UCX that behave like bare sockets: they can send anything, be cut off, or disappear silently."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from distkv_dask.errors import ChannelError
from distkv_dask.worker.channels.frames import HEADER_BYTES, parse_header
from distkv_dask.worker.channels.ucx_inlet import UcxInlet, UcxListener
from distkv_dask.worker.channels.ucx_line import UcxLine, new_context, new_worker, work


def send_bytes(line: UcxLine, data: bytes) -> int:
    """Send bytes as a frame: the first 64 as its header, the others as its payload."""
    for piece in (data[:HEADER_BYTES], data[HEADER_BYTES:]):
        if piece:
            line._post(piece, line._tag)
    work(line._worker)
    return len(data)


class UcxPeer:
    """The holder's end of a connection, used like a blocking socket."""

    def __init__(self, listener: UcxListener, inlet: UcxInlet) -> None:
        self.listener = listener
        self._inlet = inlet
        self._got = b""
        self._lock = threading.Lock()

    def recv(self, count: int) -> bytes:
        while not self._got:
            with self._lock:
                header = self._inlet.receive()
                if header is not None:
                    self._got = header.pack() + bytes(self._inlet.payload(header))
                    self._inlet.consume(header)
            time.sleep(0.001)
        taken, self._got = self._got[:count], self._got[count:]
        return taken

    def send(self, data: bytes) -> int:
        header = parse_header(data) if len(data) >= HEADER_BYTES else None
        if header is not None and len(data) < HEADER_BYTES + header.length:
            data = data[:HEADER_BYTES]  # messages are never cut, so the payload is not sent
        with self._lock:
            return send_bytes(self._inlet._line, data)

    sendall = send

    def setsockopt(self, *options: object) -> None:
        """A UCX connection always ends as abruptly as a socket that does not linger."""

    def shutdown(self, how: int) -> None:
        self.close()

    def close(self) -> None:
        self._inlet.close()
        if self.listener in _UNWANTED:
            _UNWANTED.remove(self.listener)
            self.listener.close()

    def __enter__(self) -> UcxPeer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


_UNWANTED: list[UcxListener] = []


def accepted(listener: UcxListener) -> UcxPeer:
    deadline = time.monotonic() + 10
    while (inlet := listener.accept()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return UcxPeer(listener, inlet)


def close_when_unused(listener: UcxListener) -> None:
    """Close a listener, or let its last peer do so: peers use the UCX worker of their listener."""
    if listener._inlets:
        _UNWANTED.append(listener)
    else:
        listener.close()


class _Stranger:
    """A peer that connects and sends bytes in its own thread, because both ends have to work on a connection."""

    def __init__(self, port: int) -> None:
        self._bytes: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(port,))
        self._thread.start()

    def send(self, data: bytes) -> None:
        self._bytes.put(data)

    def close(self) -> None:
        self._done.set()
        self._thread.join()

    def _run(self, port: int) -> None:
        worker = new_worker(new_context())
        endpoint = worker.create_endpoint_from_hostname("127.0.0.1", port, True)
        line = UcxLine(worker, endpoint, "a listener", accepted=False)
        with contextlib.suppress(ChannelError):
            while not self._done.wait(0.002):
                work(worker)
                if line.opened() and not self._bytes.empty():
                    send_bytes(line, self._bytes.get())
        line.close()


@contextmanager
def connected(port: int) -> Iterator[_Stranger]:
    stranger = _Stranger(port)
    try:
        yield stranger
    finally:
        stranger.close()
