"""Homes that a test plays to a real holder lane, and a holder that misbehaves on command."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from _channels import TCP, UCX, Bare, Way
from _fakes import TOKEN

from distkv_dask.gang import Gang
from distkv_dask.placement import Endpoint
from distkv_dask.worker.channels.base import Channel
from distkv_dask.worker.channels.bodies import Hello, Row, encode_hello, encode_rows
from distkv_dask.worker.channels.frames import HEADER_BYTES, Header, Kind, parse_header
from distkv_dask.worker.holder.lane import HolderLane

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
ROW = Row(1, 30, 1, False, ((0, 40),), (30,))
impatient = pytest.mark.parametrize("lane", [0.5], indirect=True)
HELLO = Hello("engine", "w0", 2, HEADS, KV_HEADS, HEAD_DIM, "float32", "a=full; aa", 0)


def gang(number: int = 1, epoch: int = 1) -> Gang:
    return Gang("engine", number, f"gang-{number}", epoch, "w0", ())


class Holder(HolderLane):
    """A holder lane that homes reach by one kind of channel."""

    def __init__(self, way: Way) -> None:
        super().__init__("127.0.0.1", 1, way.certificates)
        self._way = way
        if way is UCX:
            self.offer_ucx()

    def open(self) -> Channel:
        return self._way.open(Endpoint("w1", "127.0.0.1", self.port, self.unix, self.ucx))


def connect(lane: Holder, hello: Hello = HELLO, token: str = TOKEN) -> Channel:
    channel = lane.open()
    body = encode_hello(token.encode(), hello)
    channel.send(Header(Kind.HELLO, length=len(body)), body)
    try:
        channel.recv_into(Header(Kind.WELCOME))
    except BaseException:
        channel.close()
        raise
    return channel


def begin(home: Channel, number: int = 1, epoch: int = 1, rows: tuple[Row, ...] = (ROW,)) -> None:
    body = encode_rows(rows)
    home.send(Header(Kind.BEGIN, number, epoch, length=len(body)), body)


def ask(home: Channel, number: int = 1, epoch: int = 1, layer: int = 0, step: int = 0) -> tuple[torch.Tensor, ...]:
    q = torch.randn(1, HEADS, HEAD_DIM)
    home.send(Header(Kind.ATTEND, number, epoch, layer, step, q.nbytes, 0.125), q.numpy())
    return q, *answer(home, number, epoch, layer, step)


def answer(home: Channel, number: int, epoch: int, layer: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    got = torch.empty(HEADS * (HEAD_DIM + 1))
    expected = Header(Kind.PARTIAL, number, epoch, layer, step, got.nbytes)
    home.recv_into(expected, memoryview(got.view(torch.uint8).numpy()))
    return got[: HEADS * HEAD_DIM].view(1, HEADS, HEAD_DIM), got[HEADS * HEAD_DIM :].view(1, HEADS)


def serves(lane: Holder, number: int) -> bool:
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


class BadHolder:
    """A holder that answers HELLO and BEGIN correctly, and then behaves as the test says."""

    def __init__(self, behave: Callable[[socket.socket, Header], None], welcome: bool = True, way: Way = TCP) -> None:
        self.stop = threading.Event()
        self._behave = behave
        self._welcome = welcome
        self._server = Bare(way)
        self.endpoint = replace(self._server.endpoint, worker="w9")
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        peer = self._server.accept()
        with peer:
            for answer in (Kind.WELCOME, Kind.READY):
                header = read(peer)
                if not self._welcome:
                    break
                peer.sendall(header._replace(kind=answer, length=0).pack())
            else:
                self._behave(peer, read(peer))
            self.stop.wait(30)

    def close(self) -> None:
        self.stop.set()
        self._thread.join()
        self._server.close()


def read(peer: socket.socket) -> Header:
    header = parse_header(exactly(peer, HEADER_BYTES))
    assert header is not None
    exactly(peer, header.length)
    return header


def exactly(peer: socket.socket, count: int) -> bytes:
    got = b""
    while len(got) < count:
        more = peer.recv(count - len(got))
        assert more
        got += more
    return got
