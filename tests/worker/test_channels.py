"""Whatever happens on the wire, a frame arrives as it was sent, or an error of ours says in time what happened."""

from __future__ import annotations

import pickle
import select
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from _channels import UCX, Bare, Way, stranger

from distkv_dask.errors import ChannelError, ChannelTimeoutError, GangAbortedError, PlanError
from distkv_dask.worker.channels.base import Channel, Inlet, Listener
from distkv_dask.worker.channels.frames import HEADER_BYTES, Header, Kind, failed, failure_frame

ASK = Header(Kind.ATTEND, gang=2**40, epoch=7, layer=29, step=1000, length=6, scale=0.125)
ANSWER = Header(Kind.PARTIAL, gang=2**40, epoch=7, layer=29, step=1000, length=4)
HELLO = Header(Kind.HELLO)
MAXIMUM = 8 << 20


@dataclass
class Pair:
    home: Channel
    inlet: Inlet
    listener: Listener

    def receive(self) -> Header:
        """Poll the holder's end until a frame is complete."""
        return until(self.inlet.receive)


def until(call, seconds: float = 10.0):
    deadline = time.monotonic() + seconds
    while (result := call()) is None or result is False:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return result


def readable(inlet: Inlet) -> bool:
    return bool(select.select([inlet], [], [], 0)[0])


def flood(home: Channel) -> None:
    """Send more than all kernel buffers hold."""
    big = bytes(MAXIMUM)
    for _ in range(100):
        home.send(ASK._replace(length=len(big)), big)


@pytest.fixture
def pair(way: Way) -> Iterator[Pair]:
    listener, endpoint = way.listen(MAXIMUM)
    home = way.open(endpoint)
    inlet = greeted(home, listener)
    yield Pair(home, inlet, listener)
    inlet.close()
    closing = threading.Thread(target=home.close)  # over UCX this waits for a holder that is polling
    closing.start()
    until(lambda: listener.accept() or not closing.is_alive())
    for end in (home, inlet, listener):
        end.close()


def greeted(home: Channel, listener: Listener) -> Inlet:
    """The holder's end after a first frame, with which every channel begins: TLS and UCX connect there."""
    greeting = threading.Thread(target=home.send, args=(HELLO,))
    greeting.start()
    inlet = until(listener.accept)
    until(inlet.receive)
    inlet.consume(HELLO)
    greeting.join()
    return inlet


@pytest.fixture
def raw(way: Way) -> Iterator[tuple[socket.socket, Channel]]:
    """A home's channel whose peer is a bare socket, or behaves like one, and can send anything."""
    server = Bare(way)
    home = way.open(server.endpoint)
    greeting = threading.Thread(target=home.send, args=(HELLO,))
    greeting.start()
    peer = server.accept()
    server.close()
    peer.recv(HEADER_BYTES)
    greeting.join()
    yield peer, home
    peer.close()
    home.close()


def test_a_header_survives_packing() -> None:
    assert len(ASK.pack()) == HEADER_BYTES == 64


def test_a_frame_and_its_answer_arrive_as_sent(pair: Pair) -> None:
    pair.home.send(ASK, b"ab", b"cdef")
    assert pair.receive() == ASK
    assert bytes(pair.inlet.payload(ASK)) == b"abcdef"
    assert pair.inlet.consume(ASK) is False
    pair.inlet.send(ANSWER, b"wxyz")
    answer = bytearray(4)
    pair.home.recv_into(ANSWER, memoryview(answer))
    assert answer == b"wxyz"
    assert pair.home.idle()


def test_a_frame_without_payload_arrives(pair: Pair) -> None:
    pair.home.send(Header(Kind.END, 3))
    assert pair.receive() == Header(Kind.END, 3)
    pair.inlet.send(Header(Kind.READY, 3))
    pair.home.recv_into(Header(Kind.READY, 3))


def test_bfloat16_tensors_travel_without_a_copy_of_ours(pair: Pair) -> None:
    sent, got = torch.randn(3, 9, 64).bfloat16(), torch.empty(3, 9, 64).bfloat16()
    size = sent.nbytes
    pair.home.send(ASK._replace(length=size), sent.view(torch.uint8).numpy())
    header = pair.receive()
    data = pair.inlet.data[HEADER_BYTES : HEADER_BYTES + size].view(torch.bfloat16)
    assert torch.equal(data.view(3, 9, 64), sent)
    pair.inlet.send(ANSWER._replace(length=size), data.view(torch.uint8).numpy())
    pair.inlet.consume(header)
    pair.home.recv_into(ANSWER._replace(length=size), memoryview(got.view(-1).view(torch.uint8).numpy()))
    assert torch.equal(got, sent)


def test_frames_larger_than_all_kernel_buffers_arrive_and_the_holder_never_blocks(pair: Pair) -> None:
    big = torch.randint(0, 256, (7_000_001,), dtype=torch.uint8)
    sender = threading.Thread(target=pair.home.send, args=(ASK._replace(length=len(big)), big.numpy()))
    sender.start()
    header = pair.receive()
    sender.join()
    assert bytes(pair.inlet.payload(header)) == big.numpy().tobytes()
    pair.inlet.consume(header)
    pair.inlet.send(ANSWER._replace(length=len(big)), big.numpy())
    assert pair.inlet.sending
    got = torch.empty_like(big)
    receiver = threading.Thread(
        target=pair.home.recv_into, args=(ANSWER._replace(length=len(big)), memoryview(got.numpy()))
    )
    receiver.start()
    until(lambda: pair.inlet.flush() or not pair.inlet.sending)
    receiver.join()
    assert torch.equal(got, big)


def test_frames_that_arrive_together_are_taken_one_by_one(pair: Pair) -> None:
    frames = [Header(Kind.BATCH, 1, length=5), Header(Kind.ATTEND, 1, length=3), Header(Kind.END, 1)]
    for frame in frames:
        pair.home.send(frame, bytes([frame.kind]) * frame.length)
    time.sleep(0.05)
    for frame, more in zip(frames, (True, True, False), strict=True):
        assert pair.receive() == frame
        assert bytes(pair.inlet.payload(frame)) == bytes([frame.kind]) * frame.length
        assert (pair.inlet.consume(frame) or readable(pair.inlet)) is more


def test_frames_in_one_piece_that_exceeds_the_holders_buffer_are_all_taken(way: Way) -> None:
    if way is UCX:
        pytest.skip("UCX moves messages, and gives each its own buffer")
    listener, endpoint = way.listen(16)
    home = way.open(endpoint)
    inlet = greeted(home, listener)
    frame = ASK._replace(length=16)
    home._sock.send((frame.pack() + bytes(range(16))) * 5)  # type: ignore[attr-defined]
    for taken in range(5):
        assert until(inlet.receive) == frame
        assert bytes(inlet.payload(frame)) == bytes(range(16))
        assert (inlet.consume(frame) or readable(inlet)) is (taken < 4)
    for end in (home, inlet, listener):
        end.close()


@pytest.mark.parametrize("change", [{"gang": 1}, {"epoch": 6}, {"layer": 28}, {"step": 999}, {"length": 3}])
def test_an_answer_to_another_question_is_refused_with_both_views(pair: Pair, change: dict[str, int]) -> None:
    other = ANSWER._replace(**change)
    pair.inlet.send(other, b"x" * other.length)
    with pytest.raises(ChannelError) as caught:
        pair.home.recv_into(ANSWER, memoryview(bytearray(4)))
    assert str(other) in str(caught.value)
    assert str(ANSWER) in str(caught.value)


@pytest.mark.parametrize("payload", [0, 4, 100_000])
@pytest.mark.parametrize("reason", ["the pool is gone", "x" * 10_000, ""])
def test_a_failure_frame_of_the_holder_raises_its_reason(pair: Pair, reason: str, payload: int) -> None:
    pair.inlet.fail(2**40, 7, reason)
    with pytest.raises(GangAbortedError, match=f"w1 failed: {reason[:4096]}$"):
        pair.home.recv_into(ANSWER._replace(length=payload), memoryview(bytearray(payload)) if payload else None)


@pytest.mark.parametrize("sequence", [0, 7, 2**40])
def test_a_failure_frame_names_the_sequence_whose_plan_is_the_reason(pair: Pair, sequence: int) -> None:
    pair.inlet.fail(2**40, 7, "no such blocks", sequence)
    with pytest.raises(PlanError, match=r"w1 failed: no such blocks$") as caught:
        pair.home.recv_into(ANSWER, memoryview(bytearray(ANSWER.length)))
    assert pickle.loads(pickle.dumps(caught.value)).sequence == sequence


@pytest.mark.parametrize("length", range(9))
def test_a_failure_frame_that_was_cut_short_blames_nobody(length: int) -> None:
    _, payload = failure_frame(1, 1, "x" * 10, 7)
    assert isinstance(failed("w1", payload[:length]), GangAbortedError if length < 8 else PlanError)


def test_a_failure_frame_is_found_by_a_home_that_still_sends(pair: Pair) -> None:
    pair.inlet.fail(2**40, 7, "no room")
    with pytest.raises(GangAbortedError, match="no room"):
        flood(pair.home)


def test_a_failure_frame_of_the_home_reaches_the_holder(pair: Pair) -> None:
    pair.home.fail(5, 7, "model error")
    header = pair.receive()
    assert header._replace(length=0) == Header(Kind.FAIL, 5, 7)
    assert str(failed("w0", pair.inlet.payload(header))) == "w0 failed: model error"
    pair.inlet.consume(header)
    with pytest.raises(ChannelError, match="closed"):
        pair.receive()


def test_a_silent_peer_ends_in_a_timeout_that_names_the_setting(pair: Pair) -> None:
    pair.home.limit(0.2)
    with pytest.raises(ChannelTimeoutError, match=r"w1 did not send .* within 0.2 s.*distkv.timeouts.receive"):
        pair.home.recv_into(ANSWER, memoryview(bytearray(4)))


def test_a_peer_that_takes_nothing_ends_in_a_timeout(pair: Pair) -> None:
    pair.home.limit(0.2)
    with pytest.raises(ChannelTimeoutError, match="w1 did not take"):
        flood(pair.home)


def test_a_peer_that_trickles_ends_in_a_timeout(way: Way, raw: tuple[socket.socket, Channel]) -> None:
    if way is UCX:
        pytest.skip("UCX gives a message when it is whole: a slow one is a silent peer")
    peer, home = raw
    home.limit(0.3)
    stop = threading.Event()

    def trickle() -> None:
        frame = ANSWER._replace(length=4096).pack() + bytes(4096)
        for at in range(len(frame)):
            if stop.wait(0.05):
                return
            peer.send(frame[at : at + 1])

    thread = threading.Thread(target=trickle)
    thread.start()
    with pytest.raises(ChannelTimeoutError):
        home.recv_into(ANSWER._replace(length=4096), memoryview(bytearray(4096)))
    stop.set()
    thread.join()


@pytest.mark.parametrize("count", [0, 10, HEADER_BYTES, HEADER_BYTES + 2])
def test_a_frame_cut_off_by_a_dying_peer_is_an_error(raw: tuple[socket.socket, Channel], count: int) -> None:
    peer, home = raw
    peer.send((ANSWER.pack() + b"wxyz")[:count])
    peer.close()
    with pytest.raises(ChannelError, match=r"closed|no frame"):
        home.recv_into(ANSWER, memoryview(bytearray(4)))
    assert not home.idle()


def test_garbage_from_a_holder_is_an_error(raw: tuple[socket.socket, Channel]) -> None:
    peer, home = raw
    peer.send(b"HTTP/1.1 400 Bad Request\r\n" * 10)
    with pytest.raises(ChannelError, match="no frame"):
        home.recv_into(ANSWER, memoryview(bytearray(4)))


def test_a_leftover_of_an_old_gang_makes_a_channel_unfit_for_the_next(pair: Pair) -> None:
    assert pair.home.idle()
    pair.inlet.send(ANSWER, b"wxyz")
    time.sleep(0.05)
    assert not pair.home.idle()


def test_abort_ends_a_receive_that_blocks_in_another_thread(pair: Pair) -> None:
    threading.Timer(0.2, pair.home.abort).start()
    with pytest.raises(ChannelError, match="aborted"):
        pair.home.recv_into(ANSWER, memoryview(bytearray(4)))


def test_garbage_from_a_home_is_an_error(pair: Pair) -> None:
    with stranger(pair.listener) as somebody:
        inlet = until(pair.listener.accept)
        somebody.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 10)
        with pytest.raises(ChannelError, match=r"no frame|HTTP_REQUEST"):
            until(inlet.receive)
        inlet.close()


def test_a_frame_longer_than_expected_is_refused_before_memory_is_taken(pair: Pair) -> None:
    pair.inlet.maximum = 100
    pair.home.send(ASK._replace(length=2**50), bytes(1000))
    before = len(pair.inlet.data)
    with pytest.raises(ChannelError, match="at most 100 bytes"):
        pair.receive()
    assert len(pair.inlet.data) == before


def test_a_holder_that_is_gone_is_an_error_that_names_peer_and_address(way: Way) -> None:
    server = Bare(way)
    server.close()
    with pytest.raises(
        ChannelError, match=rf"w1 .*({server.endpoint.unix or server.endpoint.ucx or server.endpoint.port})"
    ):
        way.open(server.endpoint, 1.0).send(HELLO)
