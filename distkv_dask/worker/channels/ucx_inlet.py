"""The holder's end of channels over UCX: one UCX worker for all homes, driven by the holder lane's thread."""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import time
from typing import TYPE_CHECKING, Any

import torch
from ucxx._lib import libucxx

from distkv_dask.errors import ChannelError
from distkv_dask.worker.channels.frames import HEADER_BYTES, NOBODY, Header, checked, parse_header
from distkv_dask.worker.channels.ucx_line import UcxLine, new_context, new_worker, work

if TYPE_CHECKING:
    from typing_extensions import Buffer

LINGER_SECONDS = 1.0
"""Seconds for sent data to arrive: closing a UCX endpoint can overtake it."""


class UcxInlet:
    """Holder's end over UCX; see :class:`distkv_dask.worker.channels.base.Inlet`.

    Its descriptor is an eventfd that the listener sets when UCX has work done for it: the UCX worker has one
    descriptor for all.
    """

    def __init__(self, listener: UcxListener, line: UcxLine, maximum: int) -> None:
        self.maximum = maximum
        self.data = torch.empty(0, dtype=torch.uint8)
        self._listener = listener
        self._line = line
        self._header: Header | None = None
        self._whole = self._taken = False
        self._set = False
        self._ready = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._view = memoryview(b"")
        self.make_room(maximum)

    @property
    def peer(self) -> str:
        """The peer's name."""
        return self._line.peer

    @peer.setter
    def peer(self, name: str) -> None:
        self._line.peer = name

    @property
    def sending(self) -> bool:
        """Whether a frame is still being sent; False also if it never will be."""
        try:
            return self._line.sending
        except ChannelError:
            return False

    @property
    def events(self) -> int:
        """What :mod:`selectors` should wait for."""
        return selectors.EVENT_READ

    def make_room(self, payload: int) -> None:
        """Make ``data`` large enough for payloads of that many bytes."""
        if len(self._view) < HEADER_BYTES + payload:
            self.data = torch.empty(HEADER_BYTES + payload, dtype=torch.uint8)
            self._view = self.data.numpy().data

    def receive(self) -> Header | None:
        """Read available bytes; returns the header of a complete frame."""
        if not self._progress():
            self._listener.work()
            if not self._progress():
                self._clear()
                return None
        self._clear()
        self._taken = True
        return self._header

    def payload(self, header: Header) -> memoryview:
        """Payload of the current frame."""
        return self._view[HEADER_BYTES : HEADER_BYTES + header.length]

    def consume(self, header: Header) -> bool:
        """Drop the current frame; True if bytes of the next one have arrived already."""
        self._header, self._whole, self._taken = None, False, False
        self._line.consume()
        self._listener.work()
        return self.has_work()

    def send(self, header: Header, *buffers: Buffer) -> None:
        """Send as much of a frame as possible."""
        self._line.send(header, *buffers)
        self._listener.work()

    def flush(self) -> None:
        """Send more of what :meth:`send` could not."""
        self._listener.work()
        if self._line.sending:
            self._clear()

    def fail(self, gang: int, epoch: int, message: str, culprit: int = NOBODY) -> None:
        """Try to send a failure frame without waiting; the listener closes when the home has."""
        if self._ready < 0:
            return
        if self._line.fail(gang, epoch, message, culprit):
            self._listener.let_go(self, self._line)
            self._end()
        self.close()

    def close(self) -> None:
        """Close; can be called again."""
        if self._ready < 0:
            return
        if self._line.busy:
            self._listener.let_go(self, self._line)
        else:
            self._line.close()
            self._listener.let_go(self, None)
        self._end()

    def fileno(self) -> int:
        """Descriptor for :mod:`selectors`."""
        return self._ready

    # For the listener

    def has_work(self) -> bool:
        """Whether :meth:`receive` will return a complete frame, or raise an error."""
        try:
            return not self._taken and not self._line.sending and self._progress()
        except ChannelError:
            return True

    def wake(self) -> None:
        """Make the descriptor readable."""
        if not self._set:
            self._set = True
            os.eventfd_write(self._ready, 1)

    def _clear(self) -> None:
        if self._set:
            self._set = False
            os.eventfd_read(self._ready)

    def _progress(self) -> bool:
        """Receive from UCX; returns whether the frame is complete."""
        line = self._line
        if self._header is None:
            if not line.arrived():
                return False
            self._header = checked(self.peer, parse_header(line.head), self.maximum)
            self.make_room(self._header.length)
        if not self._whole:
            self._whole = not self._header.length or line.receive(self.payload(self._header))
        return self._whole

    def _end(self) -> None:
        os.close(self._ready)
        self._ready = -1


class UcxListener:
    """Listens for homes and drives UCX for all of them; see :class:`distkv_dask.worker.channels.base.Listener`.

    UCX listens on every network of the machine, whatever the Dask worker listens on.

    Parameters
    ----------
    maximum
        Longest payload, in bytes, that a connection may send at first.
    """

    def __init__(self, maximum: int) -> None:
        self._maximum = maximum
        self._worker = new_worker(new_context())
        self._new: list[Any] = []
        self._inlets: set[UcxInlet] = set()
        self._leaving: list[tuple[float, UcxLine]] = []
        self._listener = libucxx.UCXListener.create(self._worker, 0, self._new.append, deliver_endpoint=True)
        self.port: int = self._listener.port
        work(self._worker)

    def accept(self) -> UcxInlet | None:
        """Work for all connections, then the next new one, or None; the peer has no name until it says hello."""
        self.work()
        if not self._new:
            return None
        endpoint, peer = self._new.pop(0), f"a peer at UCX port {self.port}"
        try:
            inlet = UcxInlet(self, UcxLine(self._worker, endpoint, peer, accepted=True), self._maximum)
        except (OSError, libucxx.UCXError) as error:
            with contextlib.suppress(libucxx.UCXError):
                endpoint.close_blocking()
            raise ChannelError(f"{peer} was refused: {error}") from error
        self._inlets.add(inlet)
        self.work()
        return inlet

    def work(self) -> None:
        """Let UCX make progress, and wake the inlets concerned."""
        work(self._worker)
        for inlet in self._inlets:
            if inlet.has_work():
                inlet.wake()
        if self._leaving:
            self._see_off()

    def let_go(self, inlet: UcxInlet, line: UcxLine | None) -> None:
        """Forget an inlet; ``line``, on which something is on its way, is closed when the home has closed."""
        self._inlets.discard(inlet)
        if line is not None:
            self._leaving.append((time.monotonic() + LINGER_SECONDS, line))
            self.work()

    def fileno(self) -> int:
        """Descriptor that becomes readable when a peer connects, or on any other event."""
        return int(self._worker.epoll_file_descriptor)

    def close(self) -> None:
        """Stop listening; inlets must have been closed before. Can be called again."""
        if self._worker is None:
            return
        self._listener = None
        while self._leaving:
            work(self._worker)
            self._see_off()
            if self._leaving:
                select.select([self.fileno()], [], [], LINGER_SECONDS / 10)
        for endpoint in self._new:
            with contextlib.suppress(libucxx.UCXError):
                endpoint.close_blocking()
        self._new.clear()
        self._worker = None

    def _see_off(self) -> None:
        """Close connections whose homes have closed them or are late to do so."""
        now = time.monotonic()
        for deadline, line in self._leaving:
            line.drop()
            if now > deadline or not line.alive:
                line.close()
        self._leaving = [(deadline, line) for deadline, line in self._leaving if line.alive]
