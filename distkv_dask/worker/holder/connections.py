"""Connections of a holder lane: accepted, served, closed; only a few without a token."""

from __future__ import annotations

import contextlib
import logging
import selectors
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from distkv_dask.errors import ChannelError, DistKVError
from distkv_dask.worker.channels.base import Inlet, Listener
from distkv_dask.worker.guard import attempt
from distkv_dask.worker.holder.home_connection import HomeConnection
from distkv_dask.worker.holder.native_turns import serve
from distkv_dask.worker.holder.service import Service
from distkv_dask.worker.holder.stranger_log import StrangerLog

if TYPE_CHECKING:
    import socket

logger = logging.getLogger(__name__)
STRANGERS = 128
"""Maximum unauthenticated connections of one listener; a home sends its token with its first bytes."""
ACCEPTS = 256
"""Connections taken in one turn, so that a flood of them does not keep the lane from its homes."""


class Connections:
    """Listeners and connections of one holder lane; used by the lane's thread only, except for :attr:`poller`.

    An error of a connection ends only that connection.

    Parameters
    ----------
    services
        Engines served here, by name.
    """

    def __init__(self, services: Mapping[str, Service]) -> None:
        self._services = services
        self._connections: dict[HomeConnection, Listener] = {}
        self._listeners: list[Listener] = []
        self._resting: set[Listener] = set()
        self._log = StrangerLog()
        self._selector = selectors.DefaultSelector()
        self._poller: int = self._selector.fileno() if hasattr(self._selector, "fileno") else -1

    def watch(self, sock: socket.socket, call: Callable[[], None]) -> None:
        """Set a callback for a readable socket of the lane."""
        self._selector.register(sock, selectors.EVENT_READ, call)

    def listen(self, listener: Listener) -> None:
        """Accept homes through a listener."""
        self._selector.register(listener, selectors.EVENT_READ, partial(self._let_in, listener))
        self._listeners.append(listener)

    def wait(self, seconds: float) -> None:
        """Serve connections with pending data; otherwise wait at most this many seconds for some."""
        for key, _ in self._selector.select(0 if self._serve_natively(seconds) else seconds):
            key.data()

    def of(self, service: Service) -> list[HomeConnection]:
        """Homes that are connected for an engine."""
        return [home for home in self._connections if home.service is service]

    def serve(self, home: HomeConnection, work: Callable[[], None]) -> None:
        """Serve a connected home; a call that fails ends its channel."""
        if home not in self._connections:
            return
        inlet = home.inlet
        try:
            before = inlet.events, home.is_held
            work()
            if (inlet.events, home.is_held) != before:
                self._unwatch(inlet)
                self._watch(home)
        except Exception as error:
            self.dismiss(home, error)

    def go_on(self, service: Service) -> None:
        """Look again at an engine's questions that wait for KV."""
        for home in self.of(service):
            if home.is_held:
                self.serve(home, home.serve)

    def dismiss(self, home: HomeConnection, error: Exception) -> None:
        """Close a connection with a reason; never raises."""
        if self._connections.pop(home, None) is None:
            return
        inlet = home.inlet
        if home.service is None:
            self._log.dropped(home.host, inlet.peer, error, time.monotonic())
        elif not isinstance(error, DistKVError):
            logger.error("MicroAttention for %s failed", inlet.peer, exc_info=error)
        for step in (partial(self._unwatch, inlet), partial(home.leave, error), inlet.close):
            if (failure := attempt(step)) is not None:
                logger.error("the channel of %s did not end as it should", inlet.peer, exc_info=failure)

    def check_clock(self, now: float) -> None:
        """Close connections that are late, and resume listeners that had failed."""
        for home in list(self._connections):
            self.serve(home, partial(home.check_clock, now))
        for listener in self._listeners:
            if listener in self._resting:
                self._resting.discard(listener)
                self._selector.register(listener, selectors.EVENT_READ, partial(self._let_in, listener))
            self._let_in(listener)  # over UCX a peer that connects in the meantime is reported only once
        self._log.report(now)

    def close(self, error: Exception) -> None:
        """Close all connections and stop listening."""
        for home in list(self._connections):
            self.dismiss(home, error)
        closables: tuple[selectors.BaseSelector | Listener, ...] = (self._selector, *self._listeners)
        for closable in closables:
            if (failure := attempt(closable.close)) is not None:
                logger.error("the holder lane left something open", exc_info=failure)

    def _let_in(self, listener: Listener) -> None:
        for _ in range(ACCEPTS):
            try:
                inlet = listener.accept()
            except ChannelError as error:  # one connection was refused
                self._log.dropped(type(listener).__name__, "somebody", error, time.monotonic())
                continue
            except Exception as error:
                self._rest(listener, error)
                return
            if inlet is None:
                return
            if (failure := attempt(partial(self._add, inlet, listener))) is not None:
                self._log.dropped(type(listener).__name__, inlet.peer, failure, time.monotonic())
                attempt(inlet.close)
            self._make_room(listener)

    def _add(self, inlet: Inlet, listener: Listener) -> None:
        home = HomeConnection(inlet, self._services)
        self._watch(home)
        self._connections[home] = listener

    def _watch(self, home: HomeConnection) -> None:
        """Watch a channel; not while its question is held, since nothing that it sends then is read."""
        if not home.is_held:
            self._selector.register(home.inlet, home.inlet.events, partial(self.serve, home, home.serve))

    def _unwatch(self, inlet: Inlet) -> None:
        with contextlib.suppress(KeyError):  # its question was held
            self._selector.unregister(inlet)

    def _make_room(self, listener: Listener) -> None:
        """Drop a stranger if there are too many, unless its token has arrived: the oldest of the commonest host."""
        strangers = [one for one, where in self._connections.items() if where is listener and one.service is None]
        if len(strangers) <= STRANGERS:
            return
        host = Counter(home.host for home in strangers).most_common(1)[0][0]
        oldest = next(home for home in strangers if home.host == host)
        self.serve(oldest, oldest.serve)
        if oldest.service is None:
            self.dismiss(oldest, ChannelError(f"more than {STRANGERS} connections show no token; it was the oldest"))

    def _rest(self, listener: Listener, error: Exception) -> None:
        """Listen again after the next check of the clock: an immediate attempt would fail in the same way."""
        self._log.dropped(type(listener).__name__, "a listener, which pauses for a moment", error, time.monotonic())
        self._resting.add(listener)
        if (failure := attempt(partial(self._selector.unregister, listener))) is not None:
            logger.error("a listener of the holder lane is lost", exc_info=failure)

    def _serve_natively(self, seconds: float) -> bool:
        """Answer sessions in C++ until Python has something to do; False if there is no such session."""
        given = []
        for home in list(self._connections):
            try:
                if (turns := home.hand_to_native()) is not None:
                    given.append((home, turns))
            except Exception as error:
                self.dismiss(home, error)
        if given:
            serve(self._poller, [turns for _, turns in given], seconds)
            for home, _ in given:
                self.serve(home, home.take_from_native)
        return bool(given)
