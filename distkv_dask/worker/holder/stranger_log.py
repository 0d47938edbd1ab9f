"""Log lines on unauthenticated peers: one per minute for each address, and few for all of them."""

from __future__ import annotations

import logging

from distkv_dask.errors import DistKVError

logger = logging.getLogger(__name__)
SECONDS = 60.0
LINES = 20


class StrangerLog:
    """Logs connections that were dropped before they showed a token; used by one thread.

    In each period of :data:`SECONDS`, an address gets one line and all together :data:`LINES`; the others are counted.
    """

    def __init__(self) -> None:
        self._ends = 0.0
        self._said: set[str] = set()
        self._left_out = 0

    def dropped(self, host: str, peer: str, error: Exception, now: float) -> None:
        """Log that ``peer`` at ``host`` was dropped.

        Parameters
        ----------
        host
            Peers of one host share a line.
        peer, error
            The content of the line.
        now
            Seconds of a clock that never goes back.
        """
        self.report(now)
        if host in self._said or len(self._said) >= LINES:
            self._left_out += 1
            return
        self._said.add(host)
        unforeseen = None if isinstance(error, DistKVError | OSError) else error
        logger.warning("dropped a connection from %s: %s", peer, error, exc_info=unforeseen)

    def report(self, now: float) -> None:
        """Start a new period, if it is time, and log how many connections had no line in the last one."""
        if now < self._ends:
            return
        if self._left_out:
            logger.warning("dropped %d more connections in %g s, each without a token", self._left_out, SECONDS)
        self._ends, self._left_out = now + SECONDS, 0
        self._said.clear()
