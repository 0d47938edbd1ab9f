"""Whatever bytes arrive, from strangers or from a broken home, a holder lane serves the next home."""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from itertools import count

import pytest
from _channels import TCP, TLS, UNIX, certificates
from _fakes import TOKEN
from _peers import HEAD_DIM, HEADS, HELLO, ROW, Holder, gang, serves
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distkv_dask.errors import ChannelError
from distkv_dask.worker.channels.bodies import encode_hello, encode_rows
from distkv_dask.worker.channels.frames import HEADER_BYTES, Header, Kind, checked, parse_header

numbers = count(2**40, 1_000_003)  # far apart: a damaged frame must not fail the gang of a later example
sockets = pytest.mark.parametrize("way", [TCP, UNIX, TLS], indirect=True, ids=lambda way: way.name)
often = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def conversation(number: int) -> list[bytes]:
    """The frames of a correct home: two steps of two layers."""
    hello, rows = encode_hello(TOKEN.encode(), HELLO), encode_rows([ROW])
    question = bytes(HEADS * HEAD_DIM * 4)
    asks = [
        Header(Kind.ATTEND, number, 1, layer, step, len(question), 0.125).pack() + question
        for step in range(2)
        for layer in range(2)
    ]
    begin = Header(Kind.BEGIN, number, 1, length=len(rows)).pack() + rows
    end = Header(Kind.END, number, 1).pack()
    return [Header(Kind.HELLO, length=len(hello)).pack() + hello, begin, *asks, end]


@st.composite
def talks(draw: st.DrawFn) -> tuple[int, bytes]:
    """A gang's number and a conversation that was damaged in some ways, or is random."""
    number = next(numbers)
    frames = conversation(number)
    match draw(st.sampled_from(["garbage", "headers", "shuffled", "flipped", "spliced", "truncated"])):
        case "garbage":
            return number, draw(st.binary(max_size=300))
        case "headers":
            fields = draw(st.lists(st.tuples(*[st.integers(0, 2**bits - 1) for bits in (8, 16, 32, 32, 64, 64)])))
            known = draw(st.booleans())
            return number, (frames[0] if known else b"") + b"".join(
                struct.pack("<4sBxHIIQQd24x", b"DKV1", *one, 1.0) + draw(st.binary(max_size=80)) for one in fields
            )
        case "shuffled":
            return number, b"".join(draw(st.permutations(frames * 2)))
        case "flipped":
            data = bytearray(b"".join(frames))
            # headers and bodies, not the many zeros of the questions
            likely = [
                *range(len(frames[0]) + len(frames[1]) + HEADER_BYTES),
                *range(len(data) - HEADER_BYTES, len(data)),
            ]
            for at in draw(st.lists(st.sampled_from(likely), min_size=1, max_size=4)):
                data[at] ^= 1 << draw(st.integers(0, 7))
            return number, bytes(data)
        case "spliced":
            data, at = b"".join(frames), draw(st.integers(0, len(b"".join(frames))))
            return number, data[:at] + draw(st.binary(max_size=100)) + data[at + draw(st.integers(0, 100)) :]
        case _:
            data = b"".join(frames)
            return number, data[: draw(st.integers(0, len(data)))]


def caller(lane: Holder) -> socket.socket:
    if lane._way is UNIX:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(f"\0{lane.unix}")
        return sock
    return socket.create_connection(("127.0.0.1", lane.port), 5)


@sockets
@often
@given(
    talk=talks(),
    pieces=st.lists(st.integers(1, 400), max_size=3),
    ends=st.sampled_from(["waits", "closes", "resets"]),
    plain=st.booleans(),
    opened=st.booleans(),
)
def test_no_bytes_whatever_end_a_lane_or_its_service_of_others(
    lane: Holder, talk: tuple[int, bytes], pieces: list[int], ends: str, plain: bool, opened: bool
) -> None:
    number, data = talk
    session = lane.open_session("engine", gang(number)) if opened else None
    sock = caller(lane)
    with suppress(OSError):  # it was dropped during the message, as it should be
        if lane._way is TLS and not plain:
            sock = certificates().home.wrap_socket(sock)
        sock.settimeout(0.05)
        for size in pieces:
            sock.sendall(data[:size])
            data = data[size:]
        sock.sendall(data)
        while ends == "waits" and sock.recv(4096):
            pass
    if ends == "resets":
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
    assert serves(lane, next(numbers))
    if session is not None:  # it has ended, or an abort ends it
        lane.abort("engine", number, "the test is over")
        session.result.exception(5)
    assert lane._thread.is_alive()


@given(data=st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES), maximum=st.integers(0, 2**62))
def test_a_header_is_one_of_ours_within_its_limit_or_an_error_of_ours(data: bytes, maximum: int) -> None:
    for one in (data, b"DKV1" + data[4:]):
        header = parse_header(one)
        if header is None:
            assert one[:4] != b"DKV1" or one[4] not in set(Kind)
            continue
        if header.length > maximum:
            with pytest.raises(ChannelError):
                checked("somebody", header, maximum)
        else:
            assert checked("somebody", header, maximum) == header
        assert str(header)
