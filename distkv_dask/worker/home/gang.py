"""The home's part in one gang: its holders' channels, from BEGIN to END."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType

from distkv_dask.errors import ChannelTimeoutError, DistKVError, GangAbortedError, in_words
from distkv_dask.gang import Gang
from distkv_dask.placement import Endpoint
from distkv_dask.worker.channels.base import Channel
from distkv_dask.worker.channels.bodies import encode_rows
from distkv_dask.worker.channels.frames import Header, Kind
from distkv_dask.worker.plan import Part

NOTHING = Part((), ())
TELL_SECONDS = 1.0
"""Time to open a channel only to say that the gang has failed."""


class ChannelCache:
    """Open channels to holders, kept between gangs; used by the home lane's thread.

    Parameters
    ----------
    connect
        Connects to a holder within a number of seconds.
    hello
        Payload of the HELLO frame that every new channel starts with.
    """

    def __init__(self, connect: Callable[[Endpoint, float], Channel], hello: bytes) -> None:
        self._connect = connect
        self._hello = hello
        self._idle: dict[Endpoint, Channel] = {}

    def take_channel(self, endpoint: Endpoint, seconds: float) -> tuple[Channel, bool]:
        """A channel that no gang uses, and whether it is new and must be greeted.

        If the last one broke or was closed by the peer, a new one is connected within ``seconds``.
        """
        channel = self._idle.pop(endpoint, None)
        if channel is not None and channel.idle():
            return channel, False
        if channel is not None:
            channel.close()
        return self._connect(endpoint, seconds), True

    def greet(self, channel: Channel) -> None:
        """Say hello on a new channel and wait for the welcome.

        Raises
        ------
        ChannelError, GangAbortedError
            The holder does not know the engine or its token, or has another model.
        """
        channel.send(Header(Kind.HELLO, length=len(self._hello)), self._hello)
        channel.recv_into(Header(Kind.WELCOME))

    def keep_channel(self, endpoint: Endpoint, channel: Channel) -> None:
        """Keep a channel for the next gang."""
        self._idle[endpoint] = channel

    def close(self) -> None:
        """Close all channels."""
        while self._idle:
            self._idle.popitem()[1].close()


class HomeGang:
    """A running gang at its home, a context manager: an exception inside tells every holder.

    Parameters
    ----------
    gang
        The gang.
    cache
        Where channels come from and go to.
    timeout_start
        Seconds that holders may take to open their sessions.
    timeout_receive
        Seconds of silence of a holder after that.
    """

    def __init__(self, gang: Gang, cache: ChannelCache, timeout_start: float, timeout_receive: float) -> None:
        self.gang = gang
        self.channels: dict[str, Channel] = {}
        self._unopened = list(gang.holders)
        self._cache = cache
        self._timeout_start = timeout_start
        self.timeout_receive = timeout_receive
        self._abort_reason: str | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> HomeGang:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._end()
            return
        self._tell(error)
        if self._abort_reason is not None and not isinstance(error, GangAbortedError):
            raise GangAbortedError(f"gang {self.gang.name} was aborted: {self._abort_reason}") from error

    def open_sessions(self, parts: Mapping[str, Part]) -> None:
        """Open channels to all holders and wait until their sessions are open.

        Parameters
        ----------
        parts
            The first step's parts by worker.

        Raises
        ------
        ChannelTimeoutError
            A session does not open within ``timeout_start``.
        ChannelError, GangAbortedError
            A holder cannot be reached, or refuses.
        """
        while self._unopened:
            endpoint = self._unopened.pop()
            channel, new = self._cache.take_channel(endpoint, self.timeout_receive)
            with self._lock:
                self.channels[endpoint.worker] = channel
            self.check()
            if new:
                self._cache.greet(channel)
        deadline = time.monotonic() + self._timeout_start
        for worker, channel in self.channels.items():
            channel.limit(self._timeout_start)
            self._send_rows(Kind.BEGIN, channel, 0, parts.get(worker, NOTHING))
        for worker, channel in self.channels.items():
            channel.limit(max(0.001, deadline - time.monotonic()))
            try:
                channel.recv_into(self.header(Kind.READY))
            except ChannelTimeoutError as error:
                limit = f"{self._timeout_start:g} s (distkv.timeouts.start)"
                raise ChannelTimeoutError(f"{worker} did not join gang {self.gang.name} within {limit}") from error
            channel.limit(self.timeout_receive)

    def change(self, step: int, old: Mapping[str, Part], new: Mapping[str, Part]) -> None:
        """Tell the holders that the batch has other rows from ``step`` on."""
        for worker, channel in self.channels.items():
            if worker in old or worker in new:
                self._send_rows(Kind.BATCH, channel, step, new.get(worker, NOTHING))

    def header(self, kind: Kind) -> Header:
        """Header of a frame of this gang."""
        return Header(kind, self.gang.number, self.gang.epoch)

    def abort(self, reason: str) -> None:
        """End the gang from another thread; its home raises GangAbortedError."""
        with self._lock:
            self._abort_reason = reason
            for channel in self.channels.values():
                channel.abort()

    def check(self) -> None:
        """Raise GangAbortedError if the gang was aborted."""
        if self._abort_reason is not None:
            raise GangAbortedError(f"gang {self.gang.name} was aborted: {self._abort_reason}")

    def _send_rows(self, kind: Kind, channel: Channel, step: int, part: Part) -> None:
        rows = encode_rows(part.rows)
        channel.send(self.header(kind)._replace(step=step, length=len(rows)), rows)

    def _take_channels(self) -> dict[str, Channel]:
        with self._lock:
            channels, self.channels = self.channels, {}
        return channels

    def _end(self) -> None:
        channels = self._take_channels()
        for endpoint in self.gang.holders:
            channel = channels[endpoint.worker]
            with contextlib.suppress(ConnectionError):  # it answered everything: the gang is complete without it
                channel.send(self.header(Kind.END))
            self._cache.keep_channel(endpoint, channel)

    def _tell(self, error: BaseException) -> None:
        """Tell every holder that can be reached that the gang is over, including those that were not asked yet."""
        reason = in_words(error)
        number, epoch = self.gang.number, self.gang.epoch
        for channel in self._take_channels().values():
            channel.fail(number, epoch, self._abort_reason or reason)
        for endpoint in self._unopened:
            with contextlib.suppress(DistKVError):
                channel, new = self._cache.take_channel(endpoint, min(TELL_SECONDS, self.timeout_receive))
                try:
                    if new:
                        self._cache.greet(channel)
                finally:
                    channel.fail(number, epoch, reason)
