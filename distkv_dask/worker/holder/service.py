"""A holder lane's service for one engine: its sessions, homes that came early, and ended gangs."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from distkv_dask.errors import ChannelTimeoutError, DistKVError, GangAbortedError
from distkv_dask.gang import Gang
from distkv_dask.worker.blocks.pool import Pool
from distkv_dask.worker.channels.bodies import token_digest
from distkv_dask.worker.holder.session import Session
from distkv_dask.worker.holder.traced import TracedSession
from distkv_dask.worker.trace import Ring
from distkv_dask.worker.under_way import UnderWay

if TYPE_CHECKING:
    from distkv_dask.worker.holder.home_connection import HomeConnection
    from distkv_dask.worker.stages.turns import StageTurns

REMEMBERED = 1024
"""Number of ended gangs that are remembered, so that a late member or home is refused at once."""


class Limits(NamedTuple):
    """Seconds from a session's opening to its home's first frame (or the other way round), and of a peer's silence."""

    start: float
    receive: float


class Service:
    """Sessions of one engine; used by the holder lane's thread only.

    Parameters
    ----------
    engine
        The engine's name.
    token
        Random secret that its homes send.
    pool
        The worker's pool of its KV.
    limits
        Time limits for homes.
    ring
        Records its requests, if given.
    """

    def __init__(
        self,
        engine: str,
        token: bytes,
        pool: Pool,
        limits: Limits,
        ring: Ring | None = None,
    ) -> None:
        self.ring = ring
        self.engine = engine
        self.digest = token_digest(token)
        self.pool = pool
        self.timeout_start = limits.start
        self.silence = 2 * limits.receive
        """Seconds that a home may be silent in a gang: it may itself wait ``timeout_receive`` for another holder, and
        its report of that must come first."""
        self.under_way = UnderWay()
        """Chunks that this worker computes for the engine."""
        self.turns: StageTurns | None = None
        """Computes layers for the home, on a worker that is a further stage."""
        self._waiting: dict[int, tuple[Session, float]] = {}
        self._running: dict[int, tuple[Session, HomeConnection]] = {}
        self._early: dict[int, HomeConnection] = {}
        self._ended: OrderedDict[int, str] = OrderedDict()

    def session(self, gang: Gang) -> Session:
        """A session of a gang, to be opened with :meth:`open`."""
        session = Session(gang, self.pool) if self.ring is None else TracedSession(self.ring, gang, self.pool)
        session.under_way = self.under_way
        return session

    def open(self, session: Session) -> HomeConnection | None:
        """Add a new session; returns the home that already waits for it, if there is one."""
        number = session.gang.number
        if number in self._ended:
            session.fail(GangAbortedError(f"gang {session.gang.name} has ended on this worker: {self._ended[number]}"))
        elif number in self._waiting or number in self._running:
            session.fail(GangAbortedError(f"gang {session.gang.name} already has a session on this worker"))
        elif number in self._early:
            home = self._early.pop(number)
            self._running[number] = session, home
            return home
        else:
            self._waiting[number] = session, time.monotonic() + self.timeout_start
        return None

    def claim(self, number: int, home: HomeConnection) -> Session | None:
        """The session that a home begins; None when it is not open yet, then the home is kept until it is.

        Raises
        ------
        GangAbortedError
            The gang has ended, or another home has begun it.
        """
        if number in self._ended:
            raise GangAbortedError(f"gang {number} has ended on this worker: {self._ended[number]}")
        if number in self._running or self._early.get(number, home) is not home:
            raise GangAbortedError(f"gang {number} was begun on this worker by another home")
        if number not in self._waiting:
            self._early[number] = home
            return None
        session, _ = self._waiting.pop(number)
        self._running[number] = session, home
        return session

    def finish(self, number: int, error: Exception | None) -> None:
        """Complete a gang, or fail its session if it has one; it cannot be started again."""
        self._early.pop(number, None)
        session = (self._waiting.pop(number, None) or self._running.pop(number, None) or (None,))[0]
        self._remember(number, "it is complete" if error is None else str(error))
        if session is not None and error is not None:
            session.fail(error)
        elif session is not None:
            session.end()

    def abort(self, number: int, error: DistKVError) -> HomeConnection | None:
        """Fail a gang; returns the home to notify, if there is one."""
        home = self._early.get(number) or self._running.get(number, (None, None))[1]
        self.finish(number, error)
        return home

    def gangs_of(self, sequence: int) -> list[int]:
        """Numbers of the running gangs that have a sequence in their batch."""
        return [number for number, (session, _) in self._running.items() if sequence in session.sequences]

    def fail_all(self, error: DistKVError) -> None:
        """Fail every session."""
        for number in (*self._waiting, *self._running):
            self.finish(number, error)

    def drop_late(self, now: float) -> None:
        """Fail sessions whose home did not come in time."""
        for number, (session, deadline) in list(self._waiting.items()):
            if now > deadline:
                text = f"home {session.gang.home} did not begin gang {session.gang.name}"
                limit = f"{self.timeout_start:g} s (distkv.timeouts.start)"
                self.finish(number, ChannelTimeoutError(f"{text} within {limit}"))

    def _remember(self, number: int, reason: str) -> None:
        if number not in self._ended:
            self._ended[number] = reason
            if len(self._ended) > REMEMBERED:
                self._ended.popitem(last=False)
