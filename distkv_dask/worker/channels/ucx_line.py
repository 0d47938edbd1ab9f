"""One end of a UCX connection: whole frames in order; nothing here waits.

Connections are made to a listener, not to worker addresses: then endpoints are created in pairs, each sees the other's
end, and a holder never connects to an address named by an unauthenticated peer.

The holder gives each connection a random tag. Frames are messages under this tag: a header, then its payload, which UCX
moves between the two buffers themselves (over RDMA where the network has it). An end looks for messages instead of
posting receives in advance: ``ucxx`` keeps sockets open forever if a receive is pending when its endpoint closes.

The only synchronous interface of ``ucxx`` is private. Importing this module raises ImportError without it.
"""

from __future__ import annotations

import contextlib
import secrets
import struct
from collections import deque
from typing import TYPE_CHECKING, Any

from ucxx._lib import libucxx
from ucxx._lib.arr import Array

from distkv_dask.errors import ChannelError
from distkv_dask.worker.channels.frames import HEADER_BYTES, NOBODY, Header, failure_frame

if TYPE_CHECKING:
    from typing_extensions import Buffer

_TAG = struct.Struct("<Q")
_OPENING = libucxx.UCXXTag(0)
"""Tag of the message in which the holder says which tag the connection has."""
_FEATURES = (libucxx.Feature.TAG, libucxx.Feature.WAKEUP)


def new_context() -> Any:
    """UCX context; the workers made from one must not be used at the same time by several threads."""
    return libucxx.UCXContext({}, feature_flags=_FEATURES)


def new_worker(context: Any) -> Any:
    """UCX worker whose ``epoll_file_descriptor`` becomes readable when there is work, once :func:`work` has ended."""
    worker = libucxx.UCXWorker(context)
    worker.init_blocking_progress_mode()
    return worker


def work(worker: Any) -> None:
    """Make progress, and arm the worker's descriptor for further events."""
    worker.progress()
    while not worker.arm():
        worker.progress()


class UcxLine:
    """One end of a connection.

    Parameters
    ----------
    worker
        The UCX worker of the endpoint; callers must run :func:`work` for it.
    endpoint
        UCX endpoint with error handling, which is needed to notice a lost peer.
    peer
        The peer's name, for errors.
    accepted
        Whether this is the holder's end.
    """

    def __init__(self, worker: Any, endpoint: Any, peer: str, accepted: bool) -> None:
        self.peer = peer
        self.head = bytearray(HEADER_BYTES)
        """The received header, once :meth:`arrived`."""
        self._worker = worker
        self._endpoint = endpoint
        self._sends: deque[tuple[Any, Array]] = deque()
        self._receives: list[tuple[Any, Array]] = []
        self._tag: Any = None
        if accepted:
            tag = secrets.randbits(64) | 1
            self._tag = libucxx.UCXXTag(tag)
            self._post(_TAG.pack(tag), _OPENING)

    @property
    def alive(self) -> bool:
        """Whether the connection is open."""
        return self._endpoint is not None and bool(self._endpoint.alive)

    def opened(self) -> bool:
        """Whether the holder has accepted the connection.

        Raises
        ------
        ChannelError
            The connection broke.
        """
        if self._tag is None:
            opening = bytearray(_TAG.size)
            if not self._receive(0, _OPENING, memoryview(opening)):
                return False
            self._receives.clear()
            self._tag = libucxx.UCXXTag(_TAG.unpack(opening)[0])
        return True

    @property
    def sending(self) -> bool:
        """Whether a buffer is still in use by a send.

        Raises
        ------
        ChannelError
            The connection broke.
        """
        while self._sends and self._done(self._sends[0][0]):
            self._sends.popleft()
        return bool(self._sends)

    @property
    def busy(self) -> bool:
        """Whether the connection is open and sent data has not been received."""
        return self.alive and any(not request.completed for request, _ in self._sends)

    def send(self, header: Header, *buffers: Buffer) -> None:
        """Send a frame; its buffer must stay as it is while :attr:`sending`.

        Raises
        ------
        ChannelError
            The connection broke.
        """
        if not self.alive:
            raise self.closed()
        self._post(header.pack(), self._tag)
        payload = memoryview(buffers[0]) if len(buffers) == 1 else memoryview(b"".join(buffers))
        if payload.nbytes:
            self._post(payload, self._tag)

    def arrived(self) -> bool:
        """Whether a header is in :attr:`head`.

        Raises
        ------
        ChannelError
            The peer closed or sent an invalid header, or the connection broke.
        """
        return self._receive(0, self._tag, memoryview(self.head))

    def receive(self, buffer: memoryview) -> bool:
        """Fill ``buffer`` with the payload that belongs to :attr:`head`; True once it is.

        Raises
        ------
        ChannelError
            The payload has another length; the peer closed, or the connection broke.
        """
        return self._receive(1, self._tag, buffer)

    def consume(self) -> None:
        """Drop the received frame."""
        self._receives.clear()

    def drop(self) -> None:
        """Receive and discard messages, so that the peer's sends end."""
        try:
            while self.alive and all(self._done(request) for request, _ in self._receives):
                found = self._worker.tag_probe(self._tag)
                if not found.matched:
                    return
                array = Array(bytearray(found.length))
                found = self._worker.tag_probe(self._tag, remove=True)
                self._receives = [(self._worker.tag_recv_with_handle(array, found), array)]
        except ChannelError:
            return

    def fail(self, gang: int, epoch: int, message: str, culprit: int = NOBODY) -> bool:
        """Send a failure frame, unless another frame is on its way or nothing can be sent; whether it was sent."""
        try:
            if self._tag is None or self.sending or not self.alive:
                return False
            for part in failure_frame(gang, epoch, message, culprit):
                if part:
                    self._post(part, self._tag)
        except ChannelError:
            return False
        return True

    def close(self) -> None:
        """Close; the peer may not see what was sent last. Can be called again.

        Not while :attr:`busy`: ``ucxx`` would keep the sockets, its endpoint and the send refer to each other forever.
        """
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is not None:
            with contextlib.suppress(libucxx.UCXError):
                endpoint.close_blocking()
                work(self._worker)  # only now UCX closes the sockets
        self._sends.clear()
        self._receives.clear()
        self._worker = None  # its sockets are open while anybody refers to it

    def closed(self, got: int = 0) -> ChannelError:
        """Error for a connection that ended, ``got`` bytes into a frame."""
        return ChannelError(f"{self.peer} closed the channel" + (f" {got} bytes into a frame" if got else ""))

    def _post(self, data: Buffer, tag: Any) -> None:
        array = Array(data)
        try:
            self._sends.append((self._endpoint.tag_send(array, tag), array))
        except libucxx.UCXError as error:
            raise self.closed() from error

    def _receive(self, at: int, tag: Any, buffer: memoryview) -> bool:
        """Receive a message: number ``at`` of the current frame."""
        if len(self._receives) <= at:
            if self._worker is None:
                raise self.closed()
            found = self._worker.tag_probe(tag)
            if not found.matched:
                if not self.alive:
                    raise self.closed(at * HEADER_BYTES)
                return False
            if found.length != len(buffer):
                raise ChannelError(f"{self.peer} sent bytes that are no frame: {found.length} for {len(buffer)}")
            array = Array(buffer)
            found = self._worker.tag_probe(tag, remove=True)
            self._receives.append((self._worker.tag_recv_with_handle(array, found), array))
        done = self._done(self._receives[at][0], at * HEADER_BYTES)
        if not done and not self.alive:
            raise self.closed(at * HEADER_BYTES)
        return done

    def _done(self, request: Any, got: int = 0) -> bool:
        if not request.completed:
            return False
        try:
            request.check_error()
        except libucxx.UCXError as error:
            raise self.closed(got) from error
        return True
