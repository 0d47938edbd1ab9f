"""The holder lane: one thread that answers MicroAttention requests of all homes and never waits for any of them."""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import torch

from distkv_dask.errors import DistKVError, EngineClosedError, GangAbortedError
from distkv_dask.types import Gang
from distkv_dask.worker.channels.base import Listener
from distkv_dask.worker.channels.optional_ucx import ucx_listener
from distkv_dask.worker.channels.tcp import TcpListener
from distkv_dask.worker.channels.tls import Certificates, TlsListener
from distkv_dask.worker.channels.unix import UnixListener, machine
from distkv_dask.worker.guest import HELLO_BYTES, Guest
from distkv_dask.worker.native_session import serve
from distkv_dask.worker.service import Service
from distkv_dask.worker.session import Session

T = TypeVar("T")
logger = logging.getLogger(__name__)
TICK = 0.2
"""Seconds between looks at the time limits."""


class HolderLane:
    """Listener and thread that serve every engine of a worker.

    Parameters
    ----------
    host
        Address to listen on; homes connect to :attr:`port` of it, those on this machine to the Unix socket
        :attr:`unix` (empty where that cannot be offered), and over UCX to :attr:`ucx` (see :meth:`offer_ucx`).
    threads
        torch threads of an operation.
    certificates
        Where they are given, homes that come over TCP speak TLS.
    """

    def __init__(self, host: str, threads: int, certificates: Certificates | None = None) -> None:
        self._threads = threads
        tcp = (
            TcpListener(host, 0, HELLO_BYTES)
            if certificates is None
            else TlsListener(host, 0, HELLO_BYTES, certificates.holder)
        )
        unix = UnixListener(HELLO_BYTES) if machine() else None
        self.port, self.unix, self.ucx = tcp.port, "" if unix is None else unix.name, 0
        self._listeners: list[Listener] = [tcp] if unix is None else [tcp, unix]
        self._services: dict[str, Service] = {}
        self._guests: set[Guest] = set()
        self._commands: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._poller: int = self._selector.fileno() if hasattr(self._selector, "fileno") else -1
        for listener in self._listeners:
            self._selector.register(listener, selectors.EVENT_READ, partial(self._accept, listener))
        self._selector.register(self._woken, selectors.EVENT_READ, self._work_off)
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="distkv-holder-lane", daemon=True)
        self._thread.start()

    def offer_ucx(self) -> None:
        """Serve homes that come over UCX too, on port :attr:`ucx` (0 before). Can be called again.

        Raises
        ------
        MissingProgramError
            ``ucxx`` is not installed.
        EngineClosedError
            The lane is closed.
        """
        if self.ucx:
            return
        listener = ucx_listener(HELLO_BYTES)

        def listen() -> None:
            self._listeners.append(listener)
            self._selector.register(listener, selectors.EVENT_READ, partial(self._accept, listener))
            self.ucx = listener.port

        try:
            self.submit(listen).result()
        except EngineClosedError:
            listener.close()
            raise

    def attach(self, service: Service) -> None:
        """Serve an engine.

        Raises
        ------
        EngineClosedError
            The lane is closed.
        """
        self.submit(lambda: self._services.__setitem__(service.engine, service)).result()

    def detach(self, engine: str) -> None:
        """Serve an engine no longer: its sessions fail, its channels close. Can be called again."""

        def drop() -> None:
            service = self._services.pop(engine, None)
            if service is not None:
                error = GangAbortedError("the engine was closed on this worker")
                service.fail_all(error)
                for guest in [guest for guest in self._guests if guest.service is service]:
                    self._dismiss(guest, error)

        with contextlib.suppress(EngineClosedError):
            self.submit(drop).result()

    def open_session(self, engine: str, gang: Gang) -> Session:
        """Begin to serve a gang; returns at once, the session ends by itself.

        Raises
        ------
        EngineClosedError
            The lane is closed, or the engine is not attached.
        """
        service = self._services.get(engine)
        if service is None:
            raise EngineClosedError(f"engine {engine} is not open on this worker")
        session = service.session(gang)
        self.submit(lambda: self._open(service, session))
        return session

    def abort(self, engine: str, gang: int, reason: str) -> None:
        """End a gang's session, or refuse it when it is not open yet; its home gets a failure frame."""
        service = self._services.get(engine)
        if service is not None:
            with contextlib.suppress(EngineClosedError):
                self.submit(lambda: self._abort(service, gang, GangAbortedError(reason)))

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Run ``call`` on the lane, after everything that the lane was asked before; it must not wait for anybody.

        Raises
        ------
        EngineClosedError
            The lane is closed.
        """
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise EngineClosedError("this worker's holder lane is closed; start a new engine")
            self._commands.append((future, call))
            self._nudge()
        return future

    def retire(self, engine: str, sequence: int) -> Future[None]:
        """Complete when nothing is written to a sequence's blocks any more, whose home computes on it no more.

        A session that still has the sequence belongs to a gang that failed: frames may lie in its socket, and it ends.

        Raises
        ------
        EngineClosedError
            The lane is closed.
        """

        def end() -> None:
            if (service := self._services.get(engine)) is not None:
                for gang in service.gangs_of(sequence):
                    self._abort(service, gang, GangAbortedError(f"sequence {sequence} ended"))

        return self.submit(end)

    def close(self, timeout: float = 10.0) -> None:
        """Fail all sessions, close all channels and join the thread. Can be called again.

        Raises
        ------
        TimeoutError
            The thread does not end within ``timeout`` seconds.
        """
        with self._lock:
            already, self._closed = self._closed, True
        if not already:
            self._nudge()
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"the holder lane is still at work after {timeout:g} s")

    def _nudge(self) -> None:
        with contextlib.suppress(OSError):  # full: the lane has enough to wake it; closed: it is gone
            self._wake.send(b"c")

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        look = 0.0
        try:
            with torch.inference_mode():
                while not self._closed:
                    for key, _ in self._selector.select(0 if self._serve_natively() else TICK):
                        key.data()
                    if (now := time.monotonic()) > look:
                        look = now + TICK
                        self._look_at_clock(now)
        finally:
            self._shut()

    def _shut(self) -> None:
        with self._lock:
            self._closed = True
        self._work_off()
        error = GangAbortedError("the worker's holder lane was closed")
        for service in self._services.values():
            service.fail_all(error)
        for guest in list(self._guests):
            self._dismiss(guest, error)
        self._selector.close()
        for listener in self._listeners:
            listener.close()
        for closable in (self._wake, self._woken):
            closable.close()

    def _work_off(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(4096)
        while self._commands:
            future, command = self._commands.popleft()
            try:
                future.set_result(command())
            except Exception as error:
                future.set_exception(error)

    def _accept(self, listener: Listener) -> None:
        while (inlet := listener.accept()) is not None:
            guest = Guest(inlet, self._services)
            self._guests.add(guest)
            self._selector.register(inlet, inlet.events, partial(self._serve, guest, guest.serve))

    def _serve_natively(self) -> bool:
        """Answer sessions in C++ until Python has something to do; False where there is no such session."""
        given = [(guest, turns) for guest in self._guests if (turns := guest.give()) is not None]
        if given:
            serve(self._poller, [turns for _, turns in given], TICK)
            for guest, _ in given:
                self._serve(guest, guest.take)
        return bool(given)

    def _serve(self, guest: Guest, work: Callable[[], None]) -> None:
        """Do a home's work; whatever goes wrong ends this home's channel and nothing else."""
        if guest not in self._guests:
            return
        inlet = guest.inlet
        try:
            before = inlet.events
            work()
            if inlet.events != before:
                self._selector.modify(inlet, inlet.events, self._selector.get_key(inlet).data)
        except Exception as error:
            if not isinstance(error, DistKVError):
                logger.exception("MicroAttention for %s failed", inlet.peer)
            self._dismiss(guest, error)

    def _dismiss(self, guest: Guest, error: Exception) -> None:
        self._guests.discard(guest)
        self._selector.unregister(guest.inlet)
        guest.leave(error)

    def _open(self, service: Service, session: Session) -> None:
        guest = service.open(session)
        if guest is not None:
            self._serve(guest, lambda: guest.begin(session))

    def _abort(self, service: Service, gang: int, error: GangAbortedError) -> None:
        guest = service.abort(gang, error)
        if guest is not None:
            self._dismiss(guest, error)

    def _look_at_clock(self, now: float) -> None:
        for guest in [guest for guest in self._guests if now > guest.deadline]:
            self._dismiss(guest, guest.late())
        for service in self._services.values():
            service.drop_late(now)
