"""The holder lane: one thread that answers MicroAttention requests of all homes and never blocks on one."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import torch

from distkv_dask.errors import EngineClosedError, GangAbortedError
from distkv_dask.gang import Gang
from distkv_dask.worker.channels.base import Listener
from distkv_dask.worker.channels.optional_ucx import ucx_listener
from distkv_dask.worker.channels.tcp import TcpListener
from distkv_dask.worker.channels.tls import Certificates, TlsListener
from distkv_dask.worker.channels.unix import UnixListener, machine
from distkv_dask.worker.guard import attempt, logger, run_lane
from distkv_dask.worker.holder.connections import Connections
from distkv_dask.worker.holder.home_connection import HELLO_BYTES
from distkv_dask.worker.holder.service import Service
from distkv_dask.worker.holder.session import Session

T = TypeVar("T")
TICK = 0.2
"""Seconds between checks of the time limits."""


class HolderLane:
    """Listener and thread that serve every engine of a worker.

    Parameters
    ----------
    host
        Address to listen on; homes connect to :attr:`port` of it, those on this machine to the Unix socket
        :attr:`unix` (empty if there is none), and over UCX to :attr:`ucx` (see :meth:`offer_ucx`).
    threads
        torch threads of an operation.
    certificates
        If given, homes that connect over TCP use TLS.
    on_end
        Called with the reason, on the lane's thread, when the lane ends without :meth:`close`.
    """

    def __init__(
        self,
        host: str,
        threads: int,
        certificates: Certificates | None = None,
        on_end: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._threads = threads
        self._on_end = on_end
        tcp = (
            TcpListener(host, 0, HELLO_BYTES)
            if certificates is None
            else TlsListener(host, 0, HELLO_BYTES, certificates.holder)
        )
        unix = UnixListener(HELLO_BYTES) if machine() else None
        self.port, self.unix, self.ucx = tcp.port, "" if unix is None else unix.name, 0
        self._services: dict[str, Service] = {}
        self._connections = Connections(self._services)
        self._commands: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.setblocking(False)
        listeners: list[Listener] = [tcp] if unix is None else [tcp, unix]
        for listener in listeners:
            self._connections.listen(listener)
        self._connections.watch(self._woken, self._work_off)
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="distkv-holder-lane", daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        """Whether the lane was closed or has ended."""
        return self._closed

    def offer_ucx(self) -> None:
        """Also serve homes over UCX, on port :attr:`ucx` (0 before). Can be repeated.

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
            self._connections.listen(listener)
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
        """Stop serving an engine: its sessions fail, its channels close. Can be repeated."""

        def drop() -> None:
            service = self._services.pop(engine, None)
            if service is not None:
                error = GangAbortedError("the engine was closed on this worker")
                service.fail_all(error)
                for home in self._connections.of(service):
                    self._connections.dismiss(home, error)

        with contextlib.suppress(EngineClosedError):
            self.submit(drop).result()

    def open_session(self, engine: str, gang: Gang) -> Session:
        """Start serving a gang; returns at once, the session ends with its gang.

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
        """Run ``call`` on the lane, after all earlier calls; it must not block.

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

    def go_on(self, engine: str) -> None:
        """Answer questions that waited for KV that the home lane has now stored."""

        def look() -> None:
            if (service := self._services.get(engine)) is not None:
                self._connections.go_on(service)

        with contextlib.suppress(EngineClosedError):
            self.submit(look)

    def retire(self, engine: str, sequence: int) -> Future[None]:
        """Complete when nothing writes to the blocks of a sequence whose home has stopped computing on it.

        A session that still has the sequence belongs to a gang that failed: frames may be in its socket, so it ends.

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
        try:
            run_lane("holder lane", self._work, self._end)
        finally:
            self._shut()

    def _work(self) -> None:
        torch.set_num_threads(self._threads)
        look = 0.0
        with torch.inference_mode():
            while not self._closed:
                self._connections.wait(TICK)
                if (now := time.monotonic()) > look:
                    look = now + TICK
                    self._look_at_clock(now)

    def _end(self, reason: str) -> None:
        """The lane has ended: report it before its sessions fail, so that they are not retried here."""
        with self._lock:
            self._closed = True
        self._on_end(reason)

    def _shut(self) -> None:
        with self._lock:
            self._closed = True
        error = GangAbortedError("the worker's holder lane was closed")
        ends = [partial(service.fail_all, error) for service in self._services.values()]
        last = partial(self._connections.close, error), self._wake.close, self._woken.close
        steps: list[Callable[[], None]] = [self._work_off, *ends, *last]
        for step in steps:
            if (failure := attempt(step)) is not None:
                logger.error("the holder lane did not close as it should", exc_info=failure)

    def _work_off(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(4096)
        while self._commands:
            future, command = self._commands.popleft()
            try:
                result = command()
            except Exception as error:
                future.set_exception(error)
            except BaseException as error:
                future.set_exception(error)
                raise
            else:
                future.set_result(result)

    def _open(self, service: Service, session: Session) -> None:
        try:
            home = service.open(session)
        except Exception as error:  # the session's waiter gets the result, not the caller of this command
            session.fail(error)
            raise
        if home is not None:
            self._connections.serve(home, lambda: home.begin_session(session))

    def _abort(self, service: Service, gang: int, error: GangAbortedError) -> None:
        home = service.abort(gang, error)
        if home is not None:
            self._connections.dismiss(home, error)

    def _look_at_clock(self, now: float) -> None:
        self._connections.check_clock(now)
        for service in self._services.values():
            if (failure := attempt(partial(service.drop_late, now))) is not None:
                logger.error("late sessions of engine %s were not ended", service.engine, exc_info=failure)
