"""A holder lane serves no peer without the token, and no frame out of turn."""

from __future__ import annotations

import contextlib
import logging
import socket

import pytest
from _fakes import TOKEN
from _peers import HEAD_DIM, HEADS, HELLO, Holder, ask, begin, connect, gang, serves

from distkv_dask.errors import (
    ChannelError,
    GangAbortedError,
    PlanError,
)
from distkv_dask.worker.channels.base import Channel
from distkv_dask.worker.channels.bodies import Row, encode_hello
from distkv_dask.worker.channels.frames import Header, Kind
from distkv_dask.worker.holder import home_connection


@pytest.mark.parametrize(
    "first", [b"GET / HTTP/1.1\r\nHost: here\r\n\r\n" * 4, b"", Header(Kind.HELLO, length=2**40).pack(), bytes(64)]
)
def test_a_stranger_is_dropped_and_logged(
    lane: Holder, first: bytes, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(home_connection, "HELLO_SECONDS", 0.5)
    with caplog.at_level(logging.WARNING), socket.create_connection(("127.0.0.1", lane.port), 5) as stranger:
        stranger.sendall(first)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(100) == b""
    assert "dropped a connection from 127.0.0.1" in caplog.text
    assert serves(lane, 2)


@pytest.mark.parametrize("kind", [Kind.HELLO, Kind.BEGIN])
def test_a_wrong_token_opens_nothing(lane: Holder, kind: Kind, caplog: pytest.LogCaptureFixture) -> None:
    channel = lane.open()
    body = encode_hello(b"wrong" if kind is Kind.HELLO else TOKEN.encode(), HELLO)
    with caplog.at_level(logging.WARNING):
        channel.send(Header(kind, length=len(body)), body)
        with pytest.raises(ChannelError, match="closed"):
            channel.recv_into(Header(Kind.WELCOME))
    channel.close()
    assert "shows no token" in caplog.text
    assert TOKEN not in caplog.text
    assert serves(lane, 2)


KINDS = {"layer_kinds": "a=sliding 8; aa"}
CHANGES = [{"layers": 3}, {"kv_heads": 1}, {"head_dim": 32}, {"dtype": "bfloat16"}, KINDS, {"latent_dim": 8}]


@pytest.mark.parametrize("change", CHANGES)
def test_a_home_with_another_model_is_told_both_geometries(lane: Holder, change: dict[str, object]) -> None:
    with pytest.raises(GangAbortedError, match=r"float32.*engine, \(2, 2, 64, 'float32', 'a|bfloat16.*\(2, 2, 64"):
        connect(lane, HELLO._replace(**change))


NO_ROWS = [
    b"",
    b"\xc1",
    b"\x93\x01\x02\x03",
    b"\x81\x01\x02",
    b"\x91\x94\x01\xff\x01\xc2",
    b"\x91\x96\x01\xff\x01\xc2\x90\x91\x01",  # stored tokens below zero
    b"\x91\x96\x01\x01\x01\xc2\x91\x92\x10\x00\x91\x01",  # a span that ends before it begins
    b"\x91\x96\x01\x01\x01\xc2\x91\x91\x10\x91\x01",  # half a span
    b"\x91\x96\x01\x01\x01\xc2\x92\x00\x10\x91\x01",  # no spans
]


@pytest.mark.parametrize("body", NO_ROWS)
def test_a_batch_that_makes_no_sense_is_refused(lane: Holder, home: Channel, body: bytes) -> None:
    session = lane.open_session("engine", gang())
    home.send(Header(Kind.BEGIN, 1, 1, length=len(body)), body)
    with pytest.raises(GangAbortedError, match=r"msgpack|batch|body"):
        home.recv_into(Header(Kind.READY, 1, 1))
    assert serves(lane, 2)
    with pytest.raises((ChannelError, GangAbortedError), match=r"msgpack|batch|body"):
        session.wait(5)


def test_rows_without_room_are_refused_on_both_sides(lane: Holder, home: Channel) -> None:
    session = lane.open_session("engine", gang())
    begin(home, rows=(Row(1, 48, 1, True, ((0, 40),), (48,)),))
    with pytest.raises(PlanError, match=r"w1 failed: .* has room for 48 tokens") as told:
        home.recv_into(Header(Kind.READY, 1, 1))
    with pytest.raises(PlanError, match="has room for 48 tokens") as seen:
        session.wait(5)
    assert told.value.sequence == seen.value.sequence == 1


@pytest.mark.parametrize("change", [{"epoch": 0}, {"gang": 9}, {"layer": 1}, {"step": 1}, {"length": 64}])
def test_a_request_out_of_turn_ends_the_gang_with_both_views(
    lane: Holder, home: Channel, change: dict[str, int]
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


def test_a_gang_of_an_old_epoch_is_refused(lane: Holder, home: Channel) -> None:
    session = lane.open_session("engine", gang(epoch=5))
    begin(home, epoch=4)
    with pytest.raises(GangAbortedError, match=r"epoch 4.*epoch 5"):
        home.recv_into(Header(Kind.READY, 1, 4))
    with pytest.raises(ChannelError, match=r"epoch 4.*epoch 5"):
        session.wait(5)


def test_a_gang_that_has_ended_cannot_begin_again(lane: Holder) -> None:
    assert serves(lane, 3)
    home = connect(lane)
    begin(home, 3)
    with pytest.raises(GangAbortedError, match="gang 3 has ended"):
        home.recv_into(Header(Kind.READY, 3, 1))
    home.close()
    with pytest.raises(GangAbortedError, match="gang-3 has ended on this worker: it is complete"):
        lane.open_session("engine", gang(3)).wait(5)


def test_a_second_home_cannot_take_or_disturb_a_gang(lane: Holder, home: Channel) -> None:
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


def test_a_request_outside_any_gang_is_refused(lane: Holder, home: Channel) -> None:
    home.send(Header(Kind.ATTEND, 1, 1, length=4), b"1234")
    with pytest.raises(GangAbortedError, match="gang 1, epoch 1"):
        home.recv_into(Header(Kind.PARTIAL, 1, 1))
