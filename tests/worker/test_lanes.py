"""The home lane works in order and steps back; the holder lane serves every home that may ask, and only those."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest
import torch
from _fakes import BLOCK_TOKENS, TOKEN

from distkv_dask.errors import (
    CapacityError,
    ChannelError,
    ChannelTimeoutError,
    EngineClosedError,
    GangAbortedError,
)
from distkv_dask.kernels import micro_attention
from distkv_dask.types import Gang
from distkv_dask.worker import guest
from distkv_dask.worker.channels.frames import Header, Kind
from distkv_dask.worker.channels.tcp import TcpChannel
from distkv_dask.worker.holder_lane import HolderLane
from distkv_dask.worker.home_lane import NICENESS, HomeLane
from distkv_dask.worker.pool import Pool
from distkv_dask.worker.service import Service
from distkv_dask.worker.wire import Hello, Row, encode_hello, encode_rows

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
HELLO = Hello("engine", "w0", 2, HEADS, KV_HEADS, HEAD_DIM, "float32")


@pytest.fixture
def home_lane() -> Iterator[HomeLane]:
    lane = HomeLane(1)
    yield lane
    lane.close()


@pytest.fixture
def pool() -> Pool:
    made = Pool(layers=2, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype="float32", block_tokens=BLOCK_TOKENS, blocks=16)
    torch.manual_seed(0)
    made.storage.normal_()
    made.reserve(1, 40)
    return made


@pytest.fixture
def lane(pool: Pool) -> Iterator[HolderLane]:
    lane = HolderLane("127.0.0.1", 1)
    lane.attach(Service("engine", TOKEN.encode(), pool, timeout_start=1.0, timeout_receive=0.6))
    yield lane
    lane.close()
    lane.close()


def gang(number: int = 1, epoch: int = 1) -> Gang:
    return Gang("engine", number, f"gang-{number}", epoch, "w0", ())


def connect(lane: HolderLane, hello: Hello = HELLO, token: str = TOKEN) -> TcpChannel:
    channel = TcpChannel.open("127.0.0.1", lane.port, "w1", 10.0)
    body = encode_hello(token.encode(), hello)
    channel.send(Header(Kind.HELLO, length=len(body)), body)
    try:
        channel.recv_into(Header(Kind.WELCOME))
    except BaseException:
        channel.close()
        raise
    return channel


@pytest.fixture
def home(lane: HolderLane) -> Iterator[TcpChannel]:
    channel = connect(lane)
    yield channel
    channel.close()


def begin(home: TcpChannel, number: int = 1, epoch: int = 1, rows: tuple[Row, ...] = (Row(1, 30, 1, False),)) -> None:
    body = encode_rows(rows)
    home.send(Header(Kind.BEGIN, number, epoch, length=len(body)), body)


def ask(home: TcpChannel, number: int = 1, epoch: int = 1, layer: int = 0, step: int = 0) -> tuple[torch.Tensor, ...]:
    q = torch.randn(1, HEADS, HEAD_DIM)
    home.send(Header(Kind.ATTEND, number, epoch, layer, step, q.nbytes, 0.125), q.numpy())
    return q, *answer(home, number, epoch, layer, step)


def answer(home: TcpChannel, number: int, epoch: int, layer: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    got = torch.empty(HEADS * (HEAD_DIM + 1))
    expected = Header(Kind.PARTIAL, number, epoch, layer, step, got.nbytes)
    home.recv_into(expected, memoryview(got.view(torch.uint8).numpy()))
    return got[: HEADS * HEAD_DIM].view(1, HEADS, HEAD_DIM), got[HEADS * HEAD_DIM :].view(1, HEADS)


def serves(lane: HolderLane, number: int) -> bool:
    """Run one small gang over a new channel."""
    home = connect(lane)
    session = lane.open_session("engine", gang(number))
    begin(home, number)
    home.recv_into(Header(Kind.READY, number, 1))
    for layer in range(2):
        ask(home, number, layer=layer)
    home.send(Header(Kind.END, number, 1))
    home.close()
    return session.wait(5).requests == 2


# The home lane


def test_work_of_a_home_runs_in_the_order_it_was_submitted(home_lane: HomeLane) -> None:
    seen: list[int] = []
    for future in [home_lane.submit(seen.append, at) for at in range(50)]:
        future.result(5)
    assert seen == list(range(50))


def test_an_error_of_one_call_reaches_its_caller_and_nobody_else(home_lane: HomeLane) -> None:
    failing = home_lane.submit(lambda: 1 // 0)
    assert home_lane.submit(lambda: 5).result(5) == 5
    with pytest.raises(ZeroDivisionError):
        failing.result(5)


@pytest.mark.skipif(sys.platform != "linux", reason="thread priorities are Linux's")
def test_a_prefilling_home_steps_back_behind_the_holder_lane(home_lane: HomeLane) -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    here = home_lane.submit(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())).result(5)
    assert here == min(NICENESS, 19)
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


def test_closing_a_home_lane_cancels_what_has_not_begun() -> None:
    lane = HomeLane(1)
    started, release = threading.Event(), threading.Event()
    lane.submit(lambda: (started.set(), release.wait(5)))
    later = lane.submit(lambda: 1)
    started.wait(5)
    with pytest.raises(TimeoutError, match="still at work"):
        lane.close(0.05)
    release.set()
    lane.close()
    with pytest.raises(CancelledError):
        later.result(5)
    with pytest.raises(EngineClosedError):
        lane.submit(lambda: 1)


# The holder lane: answers


def test_a_holder_answers_with_attention_over_its_span(lane: HolderLane, home: TcpChannel, pool: Pool) -> None:
    session = lane.open_session("engine", gang())
    begin(home)
    home.recv_into(Header(Kind.READY, 1, 1))
    table = torch.tensor([pool.table(1)], dtype=torch.int32)
    for step in range(3):
        for layer in range(2):
            q, out, lse = ask(home, layer=layer, step=step)
            length = torch.tensor([30], dtype=torch.int32)
            right = micro_attention(q, pool.keys(layer), pool.values(layer), table, length, scale=0.125)
            assert torch.allclose(out, right[0], atol=1e-6)
            assert torch.allclose(lse, right[1], atol=1e-6)
    home.send(Header(Kind.END, 1, 1))
    stats = session.wait(5)
    assert (stats.requests, stats.bytes_in) == (6, 6 * HEADS * HEAD_DIM * 4)
    assert stats.bytes_out == 6 * HEADS * (HEAD_DIM + 1) * 4
    assert stats.busy_seconds > 0


def test_one_channel_serves_many_gangs_and_changing_batches(lane: HolderLane, home: TcpChannel) -> None:
    for number in range(1, 6):
        session = lane.open_session("engine", gang(number))
        begin(home, number, rows=())
        home.recv_into(Header(Kind.READY, number, 1))
        body = encode_rows([Row(1, number, 1, True)])
        home.send(Header(Kind.BATCH, number, 1, step=7, length=len(body)), body)
        size = (HEADS + 2 * KV_HEADS) * HEAD_DIM * 4
        for layer in range(2):
            home.send(Header(Kind.ATTEND, number, 1, layer, 7, size, 0.125), bytes(size))
            answer(home, number, 1, layer, 7)
        home.send(Header(Kind.END, number, 1))
        assert session.wait(5).requests == 2


def test_a_home_that_comes_before_the_session_waits_for_it(lane: HolderLane, home: TcpChannel) -> None:
    begin(home)
    time.sleep(0.1)
    session = lane.open_session("engine", gang())
    home.recv_into(Header(Kind.READY, 1, 1))
    home.send(Header(Kind.END, 1, 1))
    assert session.wait(5).requests == 0


def test_half_a_frame_of_one_home_does_not_keep_others_waiting(lane: HolderLane, home: TcpChannel) -> None:
    session = lane.open_session("engine", gang())
    begin(home)
    home.recv_into(Header(Kind.READY, 1, 1))
    home._sock.send(Header(Kind.ATTEND, 1, 1, 0, 0, HEADS * HEAD_DIM * 4, 0.125).pack() + b"half")
    assert serves(lane, 2)
    with pytest.raises(ChannelTimeoutError, match=r"silent for 0.6 s \(distkv.timeouts.receive\)"):
        session.wait(5)


def test_a_home_that_does_not_read_its_answers_keeps_nobody_waiting(lane: HolderLane, pool: Pool) -> None:
    home = connect(lane)
    home._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    session = lane.open_session("engine", gang())
    rows, queries = (Row(1, 30, 20_000, False),), 20_000
    begin(home, rows=rows)
    home.recv_into(Header(Kind.READY, 1, 1))
    q = torch.zeros(queries, HEADS, HEAD_DIM)
    home.send(Header(Kind.ATTEND, 1, 1, 0, 0, q.nbytes, 0.125), q.numpy())
    assert serves(lane, 2)
    with pytest.raises(ChannelTimeoutError):
        session.wait(5)
    home.close()


# The holder lane: refusals


@pytest.mark.parametrize(
    "first", [b"GET / HTTP/1.1\r\nHost: here\r\n\r\n" * 4, b"", Header(Kind.HELLO, length=2**40).pack(), bytes(64)]
)
def test_a_stranger_is_dropped_and_logged(
    lane: HolderLane, first: bytes, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest, "HELLO_SECONDS", 0.2)
    with caplog.at_level(logging.WARNING), socket.create_connection(("127.0.0.1", lane.port), 5) as stranger:
        stranger.sendall(first)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(100) == b""
    assert "dropped a connection from 127.0.0.1" in caplog.text
    assert serves(lane, 2)


@pytest.mark.parametrize("kind", [Kind.HELLO, Kind.BEGIN])
def test_a_wrong_token_opens_nothing(lane: HolderLane, kind: Kind, caplog: pytest.LogCaptureFixture) -> None:
    channel = TcpChannel.open("127.0.0.1", lane.port, "w1", 5.0)
    body = encode_hello(b"wrong" if kind is Kind.HELLO else TOKEN.encode(), HELLO)
    with caplog.at_level(logging.WARNING):
        channel.send(Header(kind, length=len(body)), body)
        with pytest.raises(ChannelError, match="closed"):
            channel.recv_into(Header(Kind.WELCOME))
    channel.close()
    assert "shows no token" in caplog.text
    assert TOKEN not in caplog.text
    assert serves(lane, 2)


@pytest.mark.parametrize("change", [{"layers": 3}, {"kv_heads": 1}, {"head_dim": 32}, {"dtype": "bfloat16"}])
def test_a_home_with_another_model_is_told_both_geometries(lane: HolderLane, change: dict[str, object]) -> None:
    with pytest.raises(GangAbortedError, match=r"float32.*engine, \(2, 2, 64, 'float32'\)|bfloat16.*\(2, 2, 64"):
        connect(lane, HELLO._replace(**change))


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x93\x01\x02\x03", b"\x81\x01\x02", b"\x91\x94\x01\xff\x01\xc2"])
def test_a_batch_that_makes_no_sense_is_refused(lane: HolderLane, home: TcpChannel, body: bytes) -> None:
    session = lane.open_session("engine", gang())
    home.send(Header(Kind.BEGIN, 1, 1, length=len(body)), body)
    with pytest.raises(GangAbortedError, match=r"msgpack|batch|body"):
        home.recv_into(Header(Kind.READY, 1, 1))
    assert serves(lane, 2)
    with pytest.raises(ChannelError):
        session.wait(5)


def test_rows_without_room_are_refused_on_both_sides(lane: HolderLane, home: TcpChannel) -> None:
    session = lane.open_session("engine", gang())
    begin(home, rows=(Row(1, 48, 1, True),))
    with pytest.raises(GangAbortedError, match="has room for 48 tokens"):
        home.recv_into(Header(Kind.READY, 1, 1))
    with pytest.raises(CapacityError, match="has room for 48 tokens"):
        session.wait(5)


@pytest.mark.parametrize("change", [{"epoch": 0}, {"gang": 9}, {"layer": 1}, {"step": 1}, {"length": 64}])
def test_a_request_out_of_turn_ends_the_gang_with_both_views(
    lane: HolderLane, home: TcpChannel, change: dict[str, int]
) -> None:
    session = lane.open_session("engine", gang())
    begin(home)
    home.recv_into(Header(Kind.READY, 1, 1))
    wrong = Header(Kind.ATTEND, 1, 1, 0, 0, HEADS * HEAD_DIM * 4, 0.125)._replace(**change)
    home.send(wrong, bytes(wrong.length))
    with pytest.raises(GangAbortedError, match=r"gang .*(in gang, epoch \(1, 1\)|expected ATTEND of gang 1)"):
        home.recv_into(Header(Kind.PARTIAL, 1, 1), None)
    with pytest.raises(ChannelError, match=str(wrong)):
        session.wait(5)
    assert serves(lane, 2)


def test_a_gang_of_an_old_epoch_is_refused(lane: HolderLane, home: TcpChannel) -> None:
    session = lane.open_session("engine", gang(epoch=5))
    begin(home, epoch=4)
    with pytest.raises(GangAbortedError, match=r"epoch 4.*epoch 5"):
        home.recv_into(Header(Kind.READY, 1, 4))
    with pytest.raises(ChannelError, match=r"epoch 4.*epoch 5"):
        session.wait(5)


def test_a_gang_that_has_ended_cannot_begin_again(lane: HolderLane) -> None:
    assert serves(lane, 3)
    home = connect(lane)
    begin(home, 3)
    with pytest.raises(GangAbortedError, match="gang 3 has ended"):
        home.recv_into(Header(Kind.READY, 3, 1))
    home.close()
    with pytest.raises(GangAbortedError, match="gang 3 is complete"):
        lane.open_session("engine", gang(3)).wait(5)


def test_a_second_home_cannot_take_or_disturb_a_gang(lane: HolderLane, home: TcpChannel) -> None:
    session = lane.open_session("engine", gang())
    begin(home)
    home.recv_into(Header(Kind.READY, 1, 1))
    second = connect(lane)
    begin(second)
    with pytest.raises(GangAbortedError, match="by another home"):
        second.recv_into(Header(Kind.READY, 1, 1))
    second.close()
    ask(home)
    home.send(Header(Kind.BATCH, 2, 1, length=1), b"\x90")
    with pytest.raises(ChannelError, match=r"gang 2.*\(1, 1\)"):
        session.wait(5)


def test_a_request_outside_any_gang_is_refused(lane: HolderLane, home: TcpChannel) -> None:
    home.send(Header(Kind.ATTEND, 1, 1, length=4), b"1234")
    with pytest.raises(GangAbortedError, match="gang 1, epoch 1"):
        home.recv_into(Header(Kind.PARTIAL, 1, 1))


# The holder lane: ends


@pytest.mark.parametrize("begun", [False, True])
def test_a_dying_home_ends_its_session_at_once(lane: HolderLane, home: TcpChannel, begun: bool) -> None:
    if begun:
        session = lane.open_session("engine", gang())
    begin(home)
    if begun:
        home.recv_into(Header(Kind.READY, 1, 1))
    home.close()
    if not begun:
        time.sleep(0.1)
        session = lane.open_session("engine", gang())
    with pytest.raises(ChannelError, match="w0 closed the channel"):
        session.wait(0.5)


@pytest.mark.parametrize("begun", [False, True])
def test_a_failing_home_ends_its_session_with_its_reason(lane: HolderLane, home: TcpChannel, begun: bool) -> None:
    session = lane.open_session("engine", gang())
    if begun:
        begin(home)
        home.recv_into(Header(Kind.READY, 1, 1))
    home.fail(1, 1, "its model is broken")
    with pytest.raises(GangAbortedError, match="home w0 failed: its model is broken"):
        session.wait(0.5)


def test_a_home_that_never_comes_ends_the_session_in_time(lane: HolderLane) -> None:
    session = lane.open_session("engine", gang())
    with pytest.raises(ChannelTimeoutError, match=r"did not end in 0.01 s"):
        session.wait(0.01)
    with pytest.raises(ChannelTimeoutError, match=r"did not begin gang gang-1 within 1 s \(distkv.timeouts.start\)"):
        session.wait(5)


def test_a_session_that_is_never_opened_sends_its_home_away(lane: HolderLane, home: TcpChannel) -> None:
    begin(home)
    with pytest.raises(GangAbortedError, match=r"not opened within 1 s \(distkv.timeouts.start\)"):
        home.recv_into(Header(Kind.READY, 1, 1))


@pytest.mark.parametrize("begun", [False, True])
def test_an_abort_ends_session_and_home(lane: HolderLane, home: TcpChannel, begun: bool) -> None:
    session = lane.open_session("engine", gang())
    begin(home)
    if begun:
        home.recv_into(Header(Kind.READY, 1, 1))
    lane.abort("engine", 1, "w7 died")
    with pytest.raises(GangAbortedError, match="w7 died"):
        session.wait(0.5)
    if not begun:  # READY may be on its way
        with contextlib.suppress(GangAbortedError):
            home.recv_into(Header(Kind.READY, 1, 1))
    with pytest.raises((GangAbortedError, ChannelError), match=r"w7 died|closed"):
        home.recv_into(Header(Kind.READY, 1, 1))


def test_an_abort_that_comes_first_refuses_session_and_home(lane: HolderLane, home: TcpChannel) -> None:
    lane.abort("engine", 1, "w7 died")
    begin(home)
    with pytest.raises(GangAbortedError, match="w7 died"):
        home.recv_into(Header(Kind.READY, 1, 1))
    with pytest.raises(GangAbortedError, match="w7 died"):
        lane.open_session("engine", gang()).wait(0.5)


@pytest.mark.parametrize("close", [lambda lane: lane.detach("engine"), lambda lane: lane.close()])
def test_closing_ends_sessions_and_homes(lane: HolderLane, home: TcpChannel, close) -> None:
    waiting, running = lane.open_session("engine", gang(1)), lane.open_session("engine", gang(2))
    begin(home, 2)
    home.recv_into(Header(Kind.READY, 2, 1))
    close(lane)
    close(lane)
    for session in (waiting, running):
        with pytest.raises(GangAbortedError, match="closed"):
            session.wait(0.5)
    with pytest.raises(ChannelError, match="closed"):
        ask(home, 2)
    with pytest.raises(EngineClosedError):
        lane.open_session("engine", gang(4))
