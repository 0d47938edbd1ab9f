"""A home that is connected to a holder lane: its frames, from HELLO on."""

from __future__ import annotations

import hmac
import time
from collections.abc import Mapping

from distkv_dask.errors import ChannelError, ChannelTimeoutError, DistKVError, PlanError
from distkv_dask.geometry import describe_kinds
from distkv_dask.worker.channels.base import Inlet
from distkv_dask.worker.channels.bodies import DIGEST_BYTES, Hello, Row, decode_hello, decode_rows
from distkv_dask.worker.channels.frames import NOBODY, Header, Kind, failed
from distkv_dask.worker.holder.native_turns import NativeTurns
from distkv_dask.worker.holder.service import Service
from distkv_dask.worker.holder.session import Session
from distkv_dask.worker.holder.traced import traced_receive

HELLO_BYTES = 4096
"""Longest HELLO; nothing longer is read from an unauthenticated peer."""
HELLO_SECONDS = 5.0
"""Time to say hello, so that a silent connection cannot pin resources."""
ROWS_BYTES = 1 << 20
"""Longest BEGIN or BATCH body."""


class HomeConnection:
    """Protocol state of one connected home; used by the holder lane's thread only.

    Parameters
    ----------
    inlet
        Its channel.
    services
        Engines served here, by name.
    """

    def __init__(self, inlet: Inlet, services: Mapping[str, Service]) -> None:
        self.inlet = inlet
        self.host = inlet.peer.rpartition(":")[0] or inlet.peer
        """Its address, if known."""
        self.service: Service | None = None
        self.deadline = time.monotonic() + HELLO_SECONDS
        self._services = services
        self._receive = inlet.receive
        self._hello: Hello | None = None
        self._gang: tuple[int, int] | None = None
        self._begun: tuple[int, list[Row]] = (0, [])
        self._session: Session | None = None
        self.is_held = False
        """Whether a question waits for KV that the home lane is computing."""

    def serve(self) -> None:
        """Send the rest of an answer, then handle the frames that have arrived.

        Raises
        ------
        DistKVError
            The home must be disconnected with :meth:`leave`.
        """
        inlet = self.inlet
        if inlet.sending:
            inlet.flush()
        more = True
        while more and not inlet.sending:
            header = self._receive()
            if header is None:
                return
            session = self._session
            if header.kind is Kind.ATTEND and session is not None:
                if self._holds(session, header):
                    return
                session.answer(inlet, header)
                self.deadline = time.monotonic() + self._own_service.silence
            else:
                self._handle_frame(header)
            more = inlet.consume(header)

    def _holds(self, session: Session, header: Header) -> bool:
        """Whether a question cannot be answered yet; it stays where it is, and has a time limit."""
        held, self.is_held = self.is_held, not session.is_stored(header)
        if self.is_held and not held:
            self.deadline = time.monotonic() + self._own_service.silence
        return self.is_held

    def hand_to_native(self) -> NativeTurns | None:
        """Let the session's requests be answered in C++ until :meth:`take_from_native`; None if they cannot."""
        return None if self._session is None or self.inlet.sending else self._session.hand_to_native()

    def take_from_native(self) -> None:
        """Continue in Python after :meth:`hand_to_native`; raises as :meth:`serve` does."""
        assert self._session is not None
        answered, waits = self._session.take_from_native()
        if answered:
            self.deadline = time.monotonic() + self._own_service.silence
        if waits:
            self.serve()

    def begin_session(self, session: Session) -> None:
        """Start the session whose BEGIN came."""
        self._session = session
        assert self._gang is not None
        gang, epoch = self._gang
        if epoch != session.gang.epoch:
            raise ChannelError(
                f"the home begins gang {gang} in epoch {epoch}; this holder's plan is of epoch {session.gang.epoch}"
            )
        self._set_batch(session, *self._begun)
        self.inlet.send(Header(Kind.READY, gang, epoch))

    def check_clock(self, now: float) -> None:
        """Raise an error if the home's deadline has passed.

        Raises
        ------
        ChannelTimeoutError
            The home must be disconnected with :meth:`leave`.
        """
        if now > self.deadline:
            raise self._late()

    def _late(self) -> ChannelTimeoutError:
        if self.service is None:
            return ChannelTimeoutError(f"{self.inlet.peer} showed no token within {HELLO_SECONDS:g} s")
        if self._session is None:
            limit = f"{self.service.timeout_start:g} s (distkv.timeouts.start)"
            return ChannelTimeoutError(f"this holder's session was not opened within {limit}")
        if self.is_held:
            return ChannelTimeoutError(
                f"gang {self._session.gang.name} waited {self.service.silence:g} s for KV of an earlier chunk (twice "
                "distkv.timeouts.receive); the home lane here may hang. If it is only slow, raise that limit"
            )
        return ChannelTimeoutError(
            f"home {self.inlet.peer} was silent for too long in gang {self._session.gang.name}; it may be frozen or "
            "cut off. If it is only slow, raise distkv.timeouts.receive"
        )

    def leave(self, error: Exception) -> None:
        """Send the home the reason and close its channel; its gang fails here too. Strangers get no reason."""
        if self.service is None:
            self.inlet.close()
            return
        gang = self._gang
        try:
            if gang is not None:
                self._end(error)
        finally:
            culprit = error.sequence if isinstance(error, PlanError) else NOBODY
            self.inlet.fail(*(gang or (0, 0)), str(error), culprit)

    @property
    def _own_service(self) -> Service:
        assert self.service is not None
        return self.service

    def _handle_frame(self, header: Header) -> None:
        """Handle any frame except a session's ATTEND."""
        payload = self.inlet.payload(header)
        if self.service is None:
            self._greet(header, payload)
        elif header.kind is Kind.FAIL:
            self._fail(header, failed(f"home {self.inlet.peer}", payload))
        elif self.service.turns is not None:
            self.service.turns.handle_frame(self.inlet, header, payload)
        elif header.kind is Kind.PING and self._gang is None:
            self.inlet.send(Header(Kind.PONG, step=header.step, length=header.length), payload)
        elif header.kind is Kind.BEGIN and self._gang is None:
            session = self.service.claim(header.gang, self)
            self._gang = header.gang, header.epoch
            self._begun = header.step, decode_rows(payload)
            self.deadline = time.monotonic() + self.service.timeout_start
            if session is not None:
                self.begin_session(session)
        elif self._session is None or (header.gang, header.epoch) != self._gang:
            raise ChannelError(f"{self.inlet.peer} sent {header}; this holder is in gang, epoch {self._gang}")
        elif header.kind is Kind.BATCH:
            self._set_batch(self._session, header.step, decode_rows(payload))
        elif header.kind is Kind.END:
            self._end(None)
        else:
            raise ChannelError(f"{self.inlet.peer} sent {header}, which no home sends")

    def _greet(self, header: Header, payload: memoryview) -> None:
        """Accept a HELLO with a valid token and the same model; anything else is dropped."""
        shown = bytes(payload[:DIGEST_BYTES])
        fitting = [service for service in self._services.values() if hmac.compare_digest(service.digest, shown)]
        if header.kind is not Kind.HELLO or not fitting:
            raise ChannelError("its first frame shows no token of an engine that is open here")
        hello = decode_hello(payload)
        self.service, pool = fitting[0], fitting[0].pool
        self.inlet.peer = hello.home
        kinds, latent = describe_kinds(pool.layer_kinds), pool.latent_dim
        mine = (pool.layers, pool.kv_heads, pool.head_dim, str(pool.dtype).removeprefix("torch."), kinds, latent)
        theirs = (hello.layers, hello.kv_heads, hello.head_dim, hello.dtype, hello.layer_kinds, hello.latent_dim)
        if mine != theirs or hello.engine != self.service.engine:
            raise ChannelError(
                f"home {hello.home} speaks of engine {hello.engine}, (layers, kv heads, head dim, dtype, kinds, latent "
                f"dim) {theirs}; this holder has engine {self.service.engine}, {mine}"
            )
        self._hello = hello
        if (ring := self.service.ring) is not None:
            self._receive = traced_receive(ring, self.inlet.receive)
        self.inlet.maximum = ROWS_BYTES
        self.deadline = float("inf")
        if self.service.turns is not None:
            self.service.turns.greet(self.inlet)
        self.inlet.send(Header(Kind.WELCOME))

    def _set_batch(self, session: Session, step: int, rows: list[Row]) -> None:
        assert self._hello is not None
        session.set_batch(self.inlet, self._hello.heads, step, rows)
        service = self._own_service
        # before its next request the home may have to wait for other holders, or need this one only later
        self.deadline = time.monotonic() + service.timeout_start + service.silence

    def _fail(self, header: Header, error: DistKVError) -> None:
        """The home failed: end the gang it names, also when its BEGIN never came."""
        self._own_service.finish(header.gang, error)
        raise error

    def _end(self, error: Exception | None) -> None:
        assert self._gang is not None
        gang, _ = self._gang
        self._gang = self._session = None
        self.deadline = float("inf")
        self._own_service.finish(gang, error)
