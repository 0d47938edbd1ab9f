"""Strangers that scan, hang or flood do not harm a holder lane, and a lane that ends for other reasons says so."""

from __future__ import annotations

import logging
import resource
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest
from _channels import TCP, TLS, UCX, UNIX, Way, stranger
from _fakes import TOKEN
from _peers import Holder, begin, connect, gang, serves

from distkv_dask.errors import ChannelError, EngineClosedError, GangAbortedError
from distkv_dask.worker.blocks.pool import Pool
from distkv_dask.worker.channels.base import Channel
from distkv_dask.worker.channels.frames import Header, Kind, failure_frame
from distkv_dask.worker.channels.stream_inlet import StreamInlet, StreamListener
from distkv_dask.worker.channels.tcp import TcpListener
from distkv_dask.worker.channels.tls import TlsInlet
from distkv_dask.worker.channels.unix import UnixListener
from distkv_dask.worker.holder import connections, home_connection
from distkv_dask.worker.holder.home_connection import HomeConnection
from distkv_dask.worker.holder.service import Limits, Service
from distkv_dask.worker.holder.stranger_log import LINES, SECONDS, StrangerLog
from distkv_dask.worker.home.lane import HomeLane
from distkv_dask.worker.lanes import Lanes

sockets = pytest.mark.parametrize("way", [TCP, UNIX, TLS], indirect=True, ids=lambda way: way.name)


def dialled(lane: Holder) -> tuple[socket.socket, Any]:
    """An unconnected socket for a stranger, and the address for it."""
    if lane._way is UNIX:
        return socket.socket(socket.AF_UNIX), f"\0{lane.unix}"
    return socket.socket(), ("127.0.0.1", lane.port)


@contextmanager
def visit(lane: Holder) -> Iterator[socket.socket]:
    """A stranger's connection."""
    sock, address = dialled(lane)
    with sock:
        sock.settimeout(5)
        sock.connect(address)
        yield sock


def reset(sock: socket.socket) -> None:
    """Close abruptly."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@contextmanager
def busy(lane: Holder) -> Iterator[None]:
    """Keep the lane busy, so that it accepts no connections."""
    working, done = threading.Event(), threading.Event()
    lane.submit(lambda: (working.set(), done.wait(10)))
    assert working.wait(10)
    yield
    done.set()


@sockets
@pytest.mark.parametrize("sent", [b"", b"\x16", bytes(100)])
def test_a_port_scan_changes_nothing(lane: Holder, sent: bytes) -> None:
    for round_ in range(3):
        with busy(lane):
            for _ in range(30):
                with visit(lane) as scanner:
                    scanner.sendall(sent)
                    reset(scanner)
        assert serves(lane, 2 + round_)


@sockets
def test_silent_connections_are_few_and_the_oldest_go_first(lane: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "STRANGERS", 5)
    monkeypatch.setattr(home_connection, "HELLO_SECONDS", 1000.0)
    with ExitStack() as stack:
        silent = [stack.enter_context(visit(lane)) for _ in range(20)]
        for one in silent[:15]:
            assert one.recv(100) == b""
        assert serves(lane, 2)  # its connection replaces another one
        for one in silent[16:]:
            one.settimeout(0.01)
            with pytest.raises(TimeoutError):
                one.recv(100)


@sockets
def test_half_a_handshake_counts_as_a_silent_connection(lane: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "STRANGERS", 5)
    monkeypatch.setattr(home_connection, "HELLO_SECONDS", 1000.0)
    begun = b"\x16\x03\x01\x02\x00" if lane._way is TLS else Header(Kind.HELLO, length=100).pack()
    with ExitStack() as stack:
        halves = [stack.enter_context(visit(lane)) for _ in range(20)]
        for one in halves:
            with suppress(OSError):  # it was dropped already
                one.sendall(begun)
        for one in halves[:15]:
            with suppress(ConnectionResetError):
                assert one.recv(100) == b""
        assert serves(lane, 2)


def test_a_home_whose_token_waits_to_be_read_is_not_taken_for_a_stranger(
    lane: Holder, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way in (TLS, UCX):
        pytest.skip("a token is read after several turns there")
    monkeypatch.setattr(connections, "STRANGERS", 2)
    greeted: list[Channel] = []
    with busy(lane):
        callers = [threading.Thread(target=lambda: greeted.append(connect(lane))) for _ in range(10)]
        for caller in callers:
            caller.start()
        time.sleep(0.2)
    for caller in callers:
        caller.join(10)
    assert len(greeted) == 10
    for home in greeted:
        home.close()


def test_who_floods_pushes_out_its_own_connections_and_not_those_of_others(
    lane: Holder, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way is not TCP:
        pytest.skip("only TCP has addresses to come from")
    monkeypatch.setattr(connections, "STRANGERS", 3)
    monkeypatch.setattr(home_connection, "HELLO_SECONDS", 1000.0)
    with ExitStack() as stack:
        slow = stack.enter_context(
            socket.create_connection(("127.0.0.1", lane.port), 5, source_address=("127.0.0.2", 0))
        )
        flood = [stack.enter_context(visit(lane)) for _ in range(20)]
        for one in flood[:17]:
            assert one.recv(100) == b""
        slow.settimeout(0.01)
        with pytest.raises(TimeoutError):
            slow.recv(100)


@pytest.mark.parametrize("way", [UCX], indirect=True, ids=["ucx"])
def test_silent_connections_over_ucx_are_few(lane: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    from distkv_dask.worker.channels.ucx_inlet import UcxInlet, UcxListener  # ucxx may be missing

    monkeypatch.setattr(connections, "STRANGERS", 2)
    monkeypatch.setattr(home_connection, "HELLO_SECONDS", 1000.0)
    (listener,) = [one for one in lane._connections._listeners if isinstance(one, UcxListener)]
    came: list[UcxInlet] = []
    let_in = UcxInlet.__init__
    monkeypatch.setattr(UcxInlet, "__init__", lambda self, *given: came.append(self) or let_in(self, *given))
    with ExitStack() as stack:
        for _ in range(6):
            stack.enter_context(stranger(listener))
        deadline = time.monotonic() + 20
        while len(came) < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert serves(lane, 2)
        assert len(listener._inlets) <= 3


@sockets
@pytest.mark.parametrize("lost", [False, True], ids=["a spare is kept", "the spare is lost too"])
def test_a_process_without_descriptors_turns_strangers_away_and_serves_afterwards(
    lane: Holder, lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    accept = StreamListener.accept
    monkeypatch.setattr(StreamListener, "accept", lambda self: calls.append(self) or accept(self))
    if lost:
        monkeypatch.setattr(StreamListener, "_turn_away", lambda self: [].index(1))
    callers = [dialled(lane) for _ in range(20)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with busy(lane):
        for sock, address in callers:
            sock.settimeout(5)
            sock.connect(address)
        resource.setrlimit(resource.RLIMIT_NOFILE, (_lowest_free(), limits[1]))
    try:
        if lost:
            time.sleep(1.0)
            assert len(calls) < 100  # it pauses, instead of being woken forever
        else:
            for sock, _ in callers:
                with suppress(ConnectionResetError):
                    assert sock.recv(100) == b""
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for sock, _ in callers:
            sock.close()
    assert serves(lane, 2)


def _lowest_free() -> int:
    with socket.socket() as sock:
        return sock.fileno()


def test_a_flood_of_strangers_gets_a_line_of_log_for_each_address(
    lane: Holder, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(100):
            with socket.create_connection(("127.0.0.1", lane.port), 5) as sock:
                sock.sendall(bytes(64))
                with suppress(ConnectionResetError):
                    assert sock.recv(100) == b""
        assert serves(lane, 2)
    assert caplog.text.count("dropped a connection from 127.0.0.1") == 1


def test_the_log_has_few_lines_a_minute_and_counts_the_others(caplog: pytest.LogCaptureFixture) -> None:
    log = StrangerLog()
    with caplog.at_level(logging.WARNING):
        for at in range(1000):
            log.dropped(f"10.0.0.{at % 200}", f"10.0.0.{at % 200}:{at}", ChannelError("garbage"), at / 100)
        assert len(caplog.records) == LINES
        log.report(SECONDS)
    assert f"dropped {1000 - LINES} more connections in 60 s" in caplog.text
    log.dropped("10.0.0.1", "10.0.0.1:1", ChannelError("more garbage"), SECONDS + 1)
    assert "10.0.0.1:1: more garbage" in caplog.text
    log.report(2 * SECONDS)
    assert len(caplog.records) == LINES + 2


def _broken(*args: object, **kwargs: object) -> Any:
    raise RuntimeError("nobody thought of this")


CALLBACKS: dict[str, tuple[tuple[type, ...], str]] = {
    "a listener accepts": ((StreamListener,), "accept"),
    "a connection is let in": ((TcpListener, UnixListener), "_inlet"),
    "a connection is made": ((HomeConnection,), "__init__"),
    "a frame is read": ((StreamInlet,), "receive"),
    "bytes are read": ((StreamInlet, TlsInlet), "_read"),
    "the clock is looked at": ((HomeConnection,), "check_clock"),
    "late sessions are dropped": ((Service,), "drop_late"),
    "C++ takes over": ((HomeConnection,), "hand_to_native"),
    "a home leaves": ((HomeConnection,), "leave"),
    "a failure is sent": ((StreamInlet,), "fail"),
    "a channel closes": ((StreamInlet,), "close"),
    "a session is opened": ((Service,), "open"),
    "a gang is aborted": ((Service,), "abort"),
}


@sockets
@pytest.mark.parametrize("what", CALLBACKS)
def test_nothing_that_a_lane_calls_can_end_it(what: str, lane: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name = CALLBACKS[what]
    tried = threading.Event()

    def broken(self: Any, *args: object, **kwargs: object) -> None:
        tried.set()
        if name == "close":  # its socket must not stay open for as long as the log keeps the traceback
            self._sock.close()
        _broken()

    with monkeypatch.context() as patch:
        for one in where:
            patch.setattr(one, name, broken)
        with suppress(ChannelError, GangAbortedError):
            home = connect_impatiently(lane)
            begin(home)
            with suppress(EngineClosedError, RuntimeError):
                lane.open_session("engine", gang())
            home.close()
        with visit(lane) as garbage, visit(lane):
            with suppress(OSError):  # it was dropped already
                garbage.sendall(bytes(64))
            lane.abort("engine", 1, "an abort")
            assert tried.wait(5)
    assert serves(lane, 7)


def connect_impatiently(lane: Holder) -> Channel:
    open_channel = lane.open

    def impatient() -> Channel:
        channel = open_channel()
        channel.limit(0.5)
        return channel

    lane.open = impatient  # type: ignore[method-assign]
    try:
        return connect(lane)
    finally:
        lane.open = open_channel  # type: ignore[method-assign]


@pytest.mark.parametrize("way", [UCX], indirect=True, ids=["ucx"])
@pytest.mark.parametrize("name", ["__init__", "receive", "has_work"])
def test_nothing_that_ucx_calls_can_end_a_lane(name: str, lane: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    from distkv_dask.worker.channels.ucx_inlet import UcxInlet  # ucxx may be missing

    with monkeypatch.context() as patch:
        patch.setattr(UcxInlet, name, _broken)
        with suppress(ChannelError, GangAbortedError):
            connect_impatiently(lane).close()
    assert serves(lane, 7)


def test_a_reason_that_is_no_unicode_can_be_sent() -> None:
    header, reason = failure_frame(1, 1, "half a pair: \ud83d")
    assert reason.endswith(b"half a pair: ?")
    assert len(header) == 64


def test_a_session_whose_opening_fails_is_not_waited_for(lane: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Service, "open", _broken)
    with pytest.raises(RuntimeError, match="nobody thought"):
        lane.open_session("engine", gang()).wait(5)


def test_a_holder_lane_that_ends_says_so_and_ends_what_waits_for_it(pool: Pool) -> None:
    reasons: list[str] = []
    lanes = Lanes("w1", "127.0.0.1", 1, on_end=reasons.append)
    lanes.holder.attach(Service("engine", TOKEN.encode(), pool, Limits(20.0, 20.0)))
    session = lanes.holder.open_session("engine", gang())
    assert not lanes.closed
    with pytest.raises(SystemExit):
        lanes.holder.submit(sys.exit).result(5)
    with pytest.raises(GangAbortedError, match="holder lane was closed"):
        session.wait(5)
    assert lanes.closed
    assert reasons == ["its holder lane ended: SystemExit: it gives no reason"]
    with pytest.raises(EngineClosedError):
        lanes.holder.submit(time.monotonic)
    lanes.close()
    assert len(reasons) == 1


def test_a_home_lane_that_ends_says_so_and_fails_the_calls_behind_it() -> None:
    reasons: list[str] = []
    lane = HomeLane(1, reasons.append)
    release = threading.Event()
    lane.submit(release.wait, 5).add_done_callback(lambda _: sys.exit("the end"))
    later: Callable[[], Any] = lane.submit(time.monotonic).result
    release.set()
    with pytest.raises(EngineClosedError, match="home lane has ended"):
        later()
    assert reasons == ["its home lane ended: SystemExit: the end"]
    with pytest.raises(EngineClosedError):
        lane.submit(time.monotonic)
    lane.close()
