"""The home's end of a channel over UCX: blocking, with time limits."""

from __future__ import annotations

import contextlib
import os
import select
import time
from typing import TYPE_CHECKING, Any, Self

from ucxx._lib import libucxx

from distkv_dask.errors import ChannelError, ChannelTimeoutError
from distkv_dask.worker.channels.frames import (
    FAILURE_BYTES,
    Header,
    Kind,
    failed,
    parse_header,
    timed_out,
    unexpected,
)
from distkv_dask.worker.channels.ucx_line import UcxLine, new_worker, work

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

LINGER_SECONDS = 0.2
"""Seconds for sent data to arrive: closing a UCX endpoint can overtake it."""

Left = list[tuple[Any, UcxLine]]
"""UCX workers and connections on which something is still being sent, to holders that are frozen or cut off."""


def close_left(left: Left) -> None:
    """Close connections whose holders have received all data, or are gone."""
    for worker, line in left:
        work(worker)
        if not line.busy:
            line.close()
    left[:] = [(worker, line) for worker, line in left if line.alive]


class UcxChannel:
    """Home's end over UCX; see :class:`distkv_dask.worker.channels.base.Channel`.

    It has its own UCX worker, so that it has its own descriptor to wait for, and closing it frees everything that UCX
    keeps for it.
    """

    is_duplex = False

    def __init__(self, worker: Any, line: UcxLine, address: str, seconds: float, left: Left) -> None:
        self.peer = line.peer
        self._worker = worker
        self._line = line
        self._left = left
        self._address = address
        self._seconds = seconds
        self._greeted = False
        self._aborted = False
        self._failure: Exception | None = None
        """What the peer's failure frame said; it stays the current frame."""
        self._ready = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._events = select.epoll()
        self._events.register(worker.epoll_file_descriptor, select.EPOLLIN)
        self._events.register(self._ready, select.EPOLLIN)

    @classmethod
    def open(cls, host: str, port: int, peer: str, seconds: float, context: Any, left: Left) -> Self:
        """Start connecting to a holder's listener; the first frame shows whether it answers.

        Parameters
        ----------
        left
            Channels of the same thread that were closed too early for UCX: this one may join them.

        Raises
        ------
        ChannelError
            The host does not exist.
        """
        address = f"{host}:{port}"
        worker = new_worker(context)
        try:
            endpoint = worker.create_endpoint_from_hostname(host, port, True)
        except (libucxx.UCXError, RuntimeError, ValueError) as error:
            raise ChannelError(f"cannot open a UCX channel to {peer} ({address}): {error}") from error
        return cls(worker, UcxLine(worker, endpoint, peer, accepted=False), address, seconds, left)

    def limit(self, seconds: float) -> None:
        """Set the time limit of every later call."""
        self._seconds = seconds

    def send(self, header: Header, *buffers: Buffer) -> None:
        """Send a frame; returns when its buffers are free again."""
        line = self._line
        if not self._greeted:
            self._wait(line.opened, "take", header)
            self._greeted = True
        try:
            line.send(header, *buffers)
            self._wait(lambda: not line.sending or self._failure_came(), "take", header)
            if not line.sending:
                self._settle()
                return
        except ChannelTimeoutError:
            raise
        except ChannelError:
            if not self._failure_came():
                raise
        raise self._unexpected(header)

    def recv_into(self, expected: Header, buffer: memoryview | None = None) -> None:
        """Receive exactly the frame ``expected``."""
        line = self._line
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._ready)
        self._wait(line.arrived, "send", expected)
        if line.head != expected.pack():
            raise self._unexpected(expected)
        if expected.length and buffer is not None:
            self._wait(lambda: line.receive(buffer), "send", expected)
        line.consume()
        self._settle()

    def fail(self, gang: int, epoch: int, message: str) -> None:
        """Send a failure frame and close: once the holder has reacted, at the latest after LINGER_SECONDS."""
        if self._worker is None:
            return
        if self._line.fail(gang, epoch, message):
            self._aborted = False
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._ready)
            self._seconds = LINGER_SECONDS
            with contextlib.suppress(ChannelError):
                self._wait(self._reacted, "take", Header(Kind.FAIL, gang, epoch))
        self.close()

    def abort(self) -> None:
        """End a call that blocks in another thread."""
        self._aborted = True
        with contextlib.suppress(OSError):  # closed
            os.eventfd_write(self._ready, 1)

    def close(self) -> None:
        """Close; can be called again."""
        if self._worker is None:
            return
        deadline = time.monotonic() + LINGER_SECONDS
        while self._line.busy and time.monotonic() < deadline:
            work(self._worker)
            select.select([self._worker.epoll_file_descriptor], [], [], LINGER_SECONDS / 10)
        if self._line.busy:
            self._left.append((self._worker, self._line))
        else:
            self._line.close()
        self._events.close()
        os.close(self._ready)
        self._ready = -1
        self._worker = None

    def idle(self) -> bool:
        """Whether the channel is open and nothing unread is in it."""
        if self._worker is None or self._aborted:
            return False
        work(self._worker)
        try:
            return self._line.alive and not self._line.arrived()
        except ChannelError:
            return False

    def fileno(self) -> int:
        """Descriptor that becomes readable when a frame comes."""
        return self._events.fileno()

    def _wait(self, done: Callable[[], bool], verb: str, header: Header) -> None:
        """Work until ``done()``, an abort, or the time limit."""
        deadline = time.monotonic() + self._seconds
        while True:
            if self._aborted:
                raise ChannelError(f"the channel to {self.peer} was aborted")
            if self._worker is None:
                raise self._line.closed()
            work(self._worker)
            try:
                if done():
                    return
            except ChannelError as error:
                if self._greeted:
                    raise
                raise ChannelError(f"cannot open a UCX channel to {self.peer} ({self._address}): {error}") from error
            left = deadline - time.monotonic()
            if left <= 0:
                raise timed_out(self.peer, verb, header, self._seconds)
            self._events.poll(left)

    def _settle(self) -> None:
        """Leave the descriptor readable if the next frame has arrived, or the connection has ended."""
        work(self._worker)
        try:
            ready = self._line.arrived()
        except ChannelError:
            ready = True
        if ready:
            os.eventfd_write(self._ready, 1)

    def _failure_came(self) -> bool:
        """Whether the peer's failure frame has arrived."""
        try:
            header = parse_header(self._line.head) if self._line.arrived() else None
        except ChannelError:
            return False
        return header is not None and header.kind is Kind.FAIL

    def _reacted(self) -> bool:
        """Whether the holder has taken our failure frame: it answers with its own, or closes."""
        if not self._line.alive or self._failure_came():
            return True
        if self._line.arrived():
            self._line.consume()
        return False

    def _unexpected(self, expected: Header) -> Exception:
        """Error for a header that is not ``expected``."""
        header = parse_header(self._line.head)
        if header is None or header.kind is not Kind.FAIL:
            return unexpected(self.peer, header, expected)
        if self._failure is None:
            said = bytearray(min(header.length, FAILURE_BYTES))
            if said:
                with contextlib.suppress(ChannelError):
                    self._wait(lambda: self._line.receive(memoryview(said)), "send", header)
            self._failure = failed(self.peer, said)
        return self._failure
